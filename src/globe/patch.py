"""python -m globe.patch RUN out=OUT [KEY=VALUE ...]

Put the banks of a run into the model they were learned from, and write the result as a checkpoint.

run=RUN            folder of a run of globe.train, or of one bank; what it has no bank for stays as it is;
                   `run=` may be left out
out=OUT            folder to write; it appears whole or not at all
format=dense       reconstructed matrices under the upstream names: loads in any engine, saves nothing
format=globe       factors only: loads in transformers once globe is imported
model.path=PATH    checkpoint folder or hub id, `model=PATH` too; by default the one the run was learned from
model.revision=R   revision of a hub id
S_cache=null       format=globe: experts per layer and family whose bases stay composed once loaded, 0 for none, or
                   all; null is what the run says
packed=true        format=globe: factors of few bits stay packed in the file; false writes them as plain numbers
overwrite=false    true replaces an earlier result of this command
check=auto         true looks at the result: load it, compare a few experts with the banks, generate ten tokens; auto
                   does so where the checkpoint has at most 40 % of the machine's memory
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from globe.config.command_line import parse_options, path_option, run_command
from globe.config.commands import start
from globe.errors import ConfigError, printable, sentence
from globe.files import clear_folders
from globe.hf.dense_checkpoint import write_dense
from globe.hf.globe_checkpoint import write_globe
from globe.hf.loading import quiet
from globe.hf.run_banks import open_run, open_source, recorded_cache
from globe.hf.sanity import fits_in_memory, look
from globe.runs.folder import RunFolder, State


class Format(StrEnum):
    dense = "dense"
    globe = "globe"


@dataclass
class SourceOptions:
    path: str | None = path_option(None)
    revision: str | None = None


@dataclass
class PatchOptions:
    """The options of the command, as the text above says."""

    run: str = path_option()
    out: str = path_option()
    format: Format = Format.dense
    model: SourceOptions = field(default_factory=SourceOptions)
    S_cache: int | str | None = None
    packed: bool = True
    overwrite: bool = False
    check: bool | str = "auto"


def parse(arguments: Sequence[str]) -> PatchOptions:
    """Checked options of a command line. Raises ConfigError, or OmegaConf's error for a key or value."""
    options = parse_options(PatchOptions, arguments, positional="run")
    _refuse_other_checks(options)
    return options


def _refuse_other_checks(options: PatchOptions) -> None:
    if options.check not in (True, False, "auto"):
        raise ConfigError(f"check={options.check!r} is not possible: give one of auto, true, false")


def patch(options: PatchOptions) -> dict[str, Any]:
    """Read the run, check it against its model, write the checkpoint; return the record written beside it."""
    clear_folders(Path(options.out).absolute().parent)
    banks = open_run(options.run)
    checkpoint = open_source(banks, options.model.path, revision=options.model.revision)
    match options.format:
        case Format.dense:
            return write_dense(banks, checkpoint, options.out, overwrite=options.overwrite)
        case Format.globe:
            cache = recorded_cache(options.run) if options.S_cache is None else options.S_cache
            return write_globe(
                banks,
                checkpoint,
                options.out,
                S_cache=cache,
                packed=options.packed,
                overwrite=options.overwrite,
            )


def main() -> None:
    run_command(__doc__ or "", PatchOptions, _patch_and_say, positional="run")


def _weights(options: PatchOptions, before: int) -> str:
    """Return how many bytes the weights take in files, beside `before` of the original."""
    held = sum(file.stat().st_size for file in Path(options.out).glob("*.safetensors"))
    dense = ", since experts are multiplied out" if options.format == "dense" else ""
    return f"{held:,} bytes of weights in files, {held / before:.1%} of the original's{dense}"


def _patch_and_say(options: PatchOptions) -> None:
    _refuse_other_checks(options)
    status = RunFolder(options.run).status
    record = patch(options)
    if status is not None and status.state is not State.finished:
        lacking = sorted(key for key, bank in status.banks.items() if bank.state is not State.finished)
        named = f", without {', '.join(lacking)}" if lacking else ""
        print(
            sentence(f"{options.run} is {status.state}: only the banks it has were used{named}"),
            file=sys.stderr,
        )
    if record["left_out"]:
        print(sentence(f"left out beside the weights: {', '.join(record['left_out'])}"), file=sys.stderr)
    parameters, count = record["parameters"], len(record["banks"])
    # plain numbers stand in the file where packed=false
    bits = (
        f" in {8 * record['kept_bytes'] / parameters['families']:.2f} bits a weight" if options.packed else ""
    )
    out = printable(options.out)
    print(
        f"{out}: {options.format}, {count} bank{'s' * (count != 1)}; kept "
        f"{parameters['kept_of_families']:.3f} of the compressed families{bits}, {parameters['kept_of_model']:.3f} "
        f"of the model's {parameters['model']:,} parameters; {_weights(options, record['source_file_bytes'])}"
    )
    if options.check is True or (options.check == "auto" and fits_in_memory(Path(options.out))):
        quiet()
        print(f"checked: {look(options.out, open_run(options.run)).sentence}")
    print(f"next: python -m globe.evaluate model={out}; hf upload USER/NAME {out} --private shares it")


if __name__ == "__main__":
    start(main)
