"""More good files to damage, for `fuzz.py`: unfinished fits, packed factors, caches, reports, quantised checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from readers import Reader, bank_of, model_of

TESTS = Path(__file__).parents[2] / "tests"
QUANTISED = ("fp8", "mxfp4", "gptq", "awq", "compressed")


def state_of(folder: Path) -> object:
    """Read a fit's checkpoint whose record names the hash of the tensors as they are, so that they are looked at."""
    from globe.am.records import Sizes
    from globe.am.running import require_fitting
    from globe.files import sha256
    from globe.fit.unfinished_fit import read_state

    file, record = folder / "state-0.safetensors", folder / "state.json"
    try:
        small = record.is_file() and record.stat().st_size < 1 << 20
        held = json.loads(record.read_text()) if small else None
        if isinstance(held, dict) and "sha256" in held and file.is_file() and file.stat().st_size < 1 << 20:
            held["sha256"] = sha256(file)
            record.write_text(json.dumps(held))
    except (OSError, ValueError, RecursionError, UnicodeError):
        pass  # no JSON any more, which is for the reader to say
    return read_state(folder, "abc", lambda state: require_fitting(state, Sizes(4, 20, 24, m=3, r=7)))


def statistics_of(folder: Path) -> object:
    from globe.calibration.run import recorded_passages
    from globe.calibration.statistics import is_complete, read_statistics

    is_complete(folder / "layer-001.safetensors", key="abc")
    return recorded_passages(folder), read_statistics(folder / "layer-001.safetensors", key="abc")


def output_of(folder: Path) -> object:
    from globe.calibration.statistics import read_output

    return read_output(folder / "output-001.safetensors", key="abc")


def report_of(folder: Path) -> object:
    """Read what a report is made of, and make its tables of digits."""
    from globe.reporting.digits import digits
    from globe.reporting.documents import to_csv
    from globe.reporting.labels import varied_options
    from globe.reporting.runs import read_runs

    runs = read_runs(folder, key="sweep")
    return to_csv(digits(runs, varied_options(runs)))


def sizes_of(folder: Path) -> object:
    from globe.sizes.chosen import _read, frontier_table

    return [frontier_table(one) for one in _read(folder / "frontier.json").values()]


def experts_of(folder: Path) -> object:
    from globe.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(folder))
    layer = checkpoint.moe_layers[0]
    return [checkpoint.read_experts(layer, one, max_experts=2) for one in checkpoint.families(layer)]


def more_sources(folder: Path, sources: dict[str, Reader]) -> dict[str, Reader]:
    """Good files of the kinds above, by name; `sources` are those of `readers.make_sources` in the same folder."""
    found = {
        "state.json": Reader(_state(folder / "fit"), "state.json", state_of),
        "state tensors": Reader(folder / "fit", "state-0.safetensors", state_of),
        "statistics": Reader(_statistics(folder / "cache"), "layer-001.safetensors", statistics_of),
        "output weights": Reader(folder / "cache", "output-001.safetensors", output_of),
        "calibration.json": Reader(folder / "cache", "calibration.json", statistics_of),
    }
    run = _run(folder / "finished")
    for file in ("summary.json", "metrics.jsonl", "evaluation.json", "allocation.json"):
        if (run / "one" / file).is_file():
            found[f"report: {file}"] = Reader(run, f"one/{file}", report_of)
    found["frontier.json"] = Reader(run / "one", "frontier.json", sizes_of)
    for kind in ("packed", "coded"):
        compact = _of_few_bits(folder, kind, sources)
        found[f"{kind} bank.safetensors"] = Reader(folder / f"{kind}-bank", "bank.safetensors", bank_of)
        for file in ("config.json", "model.safetensors"):
            found[f"{kind} {file}"] = Reader(compact, file, model_of)
    for kind in QUANTISED:
        checkpoint = _quantised(folder / kind, kind)
        found[f"{kind} config.json"] = Reader(checkpoint, "config.json", experts_of)
        found[f"{kind} scales"] = Reader(checkpoint, "model-00001-of-00002.safetensors", experts_of)
    return found


def _state(folder: Path) -> Path:
    """The state of a short fit, as it is on disk."""
    import torch

    from globe.am.loop import fit_bank
    from globe.am.options import FitOptions
    from globe.am.records import FitState, Sizes
    from globe.fit.options import fit_options
    from globe.fit.unfinished_fit import Fitting, write_state

    generator, states = torch.Generator().manual_seed(0), list[FitState]()
    options: FitOptions = fit_options(_config("train.steps=2", "train.checkpoint_every=0"))
    X = torch.randn(4, 20, 24, generator=generator)
    fit_bank(
        X,
        Sizes(4, 20, 24, m=3, r=7),
        options,
        generator=generator,
        on_step=lambda record: None,
        on_checkpoint=states.append,
    )
    write_state(folder, states[-1], Fitting("abc", 0, 1))
    record = json.loads((folder / "state.json").read_text())
    (folder / record["tensors"]).rename(folder / "state-0.safetensors")
    (folder / "state.json").write_text(json.dumps(record | {"tensors": "state-0.safetensors"}))
    return folder


def _statistics(folder: Path) -> Path:
    import torch

    from globe.calibration.statistics import (
        LayerStatistics,
        OutputWeights,
        SecondMoments,
        write_output,
        write_statistics,
    )

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(0))

    made = LayerStatistics(
        layer=1,
        inputs=SecondMoments(matrix=some(3, 7, 7)),
        inner=SecondMoments(factor=some(3, 5, 2), diagonal=some(3, 5)),
        counts=some(3).double(),
        gate2=some(3).double(),
        rows_up=some(3, 5),
        rows_gate=some(3, 5),
        reap=some(3).double(),
    )
    write_statistics(made, folder / "layer-001.safetensors", key="abc")
    write_output(OutputWeights(some(7, 7), some(3, 5)), folder / "output-001.safetensors", layer=1, key="abc")
    (folder / "calibration.json").write_text(json.dumps({"key": "abc", "tokens": 128, "passages": [3, 5, 8]}))
    return folder


def _run(folder: Path) -> Path:
    """A folder with one run that chose its sizes, and an evaluation in it."""
    import contextlib
    import os

    from globe.train import run

    options = ("model.max_experts=4", "layer=5", "bank.kept=0.5", "budget.seconds=0.01", "train.steps=2")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        run(_node(*options), folder / "one")
    interval, change = [1.0, 3.0], {"ratio": 0.5, "original": 8, "compressed": 4}
    own = {"perplexity": 2.0, "perplexity_interval": interval}
    record = {
        "format_version": 1, "perplexity": own, "perplexity_original": own,
        "rise": {"ratio": 1.1, "ratio_interval": interval}, "divergence": {"kl": 0.1, "top1_agreement": 0.9},
        "settings": {"text": "a", "counted_tokens": 7, "window": 16}, "sizes": {"model_parameters": change},
    }  # fmt: skip
    (folder / "one" / "evaluation.json").write_text(json.dumps(record))
    return folder


def _of_few_bits(folder: Path, kind: str, sources: dict[str, Reader]) -> Path:
    """A bank with packed or coded factors in `KIND-bank`, and the compact checkpoint made of it in `KIND`."""
    import torch

    from globe.bank.coded import Coded
    from globe.bank.file import read_artefact, write_artefact
    from globe.bank.packing import Packed
    from globe.bank.rounding import Grid, StepGrid, round_nearest
    from globe.checkpoint import open_checkpoint
    from globe.hf.globe_checkpoint import write_globe
    from globe.hf.run_banks import open_run

    bank = read_artefact(sources["globe.json"].source)
    assert bank.bank is not None
    n, p, r = bank.adapters.shape
    found: dict[str, Packed | Coded] = {"bank": Packed.of(round_nearest(bank.bank, Grid.of(5, 24, 8)))}
    if kind == "coded":
        steps = StepGrid(r, torch.zeros(n, p, dtype=torch.uint8))
        found["adapters"] = Coded.of(round_nearest(bank.adapters, steps), torch.ones(r))
    else:
        found["adapters"] = Packed.of(round_nearest(bank.adapters, Grid.of((4, 4, 3, 3, 2, 2, 2), 7, 5)))
    made = replace(bank, packed=found, **{name: one.values() for name, one in found.items()})  # type: ignore[arg-type]
    write_artefact(made, folder / f"{kind}-run" / "banks" / "layer001.up")
    write_artefact(made, folder / f"{kind}-bank")
    checkpoint = open_checkpoint(str(sources["config.json"].source))
    write_globe(open_run(folder / f"{kind}-run"), checkpoint, folder / kind)
    return folder / kind


def _quantised(folder: Path, kind: str) -> Path:
    """A checkpoint of the tests' own writers, which use the libraries that quantise."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    import quantised_models as made

    families: dict[str, tuple[str, dict[str, Any], Callable[..., Any]]] = {
        "fp8": ("qwen3_moe", made.FP8, made.fp8_blocks),
        "mxfp4": ("gpt_oss", made.MXFP4, made.mxfp4),
        "gptq": ("mixtral", made.gptq_config(4), made.gptq(4)),
        "awq": ("mixtral", made.AWQ, made.awq),
        "compressed": ("qwen3_moe", made.compressed_config("int4 group"), made.compressed("int4 group")),
    }
    folder.mkdir()
    made.write_quantised(folder, *families[kind], upstream=kind != "mxfp4")
    return folder


def _node(*words: str) -> Any:
    from hydra import compose, initialize_config_dir

    from globe.config.composition import conf_dir, register

    register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("config", overrides=list(words))


def _config(*words: str) -> Any:
    from globe.config.composition import to_config

    return to_config(_node(*words))
