"""Perplexity and KL against the kept ratio, for GloBE and what it is measured against, at equal budgets.

    python experiments/bench/perplexity.py [CHECKPOINT] --text TEXT --seconds 60

Every cell of the table is a run of globe.train over up and gate of all layers (`method=METHOD bank.kept=KEPT`), whose
banks are then put dense into a copy of the model in memory. Cells are kept in --out, as are their runs: a second call
with the same options does only what is missing, in the middle of a fit if it was cut off there. Seconds are of the
processor and for each matrix, so that other work on the machine changes nothing; the closed forms take what they need.
GloBE searches its sizes within the budget (`bank.kept`, once per share), unless --globe-sizes gives them: atoms m, rows
r and, for low-rank atoms, their rank. Its form can be chosen with --globe, all methods' options with --set, both as for
globe.train:

    python experiments/bench/perplexity.py --globe bank.activation=tanh --globe-sizes 0.47=60,88,17 0.35=12,64

A method may name the metric that its errors count in: svd+inputs, globe+experts. The metric of inputs takes
--calibrate, another text than the one that is evaluated. --prune drops whole experts by REAP's score on it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import globe.fit.baseline
import globe.fit.one_bank
import globe.train
from globe.calibration.experts_module import experts_modules
from globe.calibration.run import Calibration, calibrate
from globe.calibration.text import Tokens, tokenise
from globe.checkpoint import open_checkpoint
from globe.config.commands import explain
from globe.config.composition import conf_dir, plain, to_config
from globe.config.identity import identity
from globe.errors import ConfigError, GlobeError
from globe.evaluation.activation_error import activation_errors
from globe.evaluation.divergence import divergence
from globe.evaluation.perplexity import perplexity, rise, score
from globe.evaluation.subject import Subject, check_model, load_tokenizer
from globe.evaluation.text import Window, read_text, sliding_windows
from globe.files import read_record, write_json
from globe.fit.plan import plan
from globe.hf import patch_model
from globe.runs.summary import read_summary

_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ADAM = ("mobe", "mobe_corrected", "slbf")
METHODS = ("globe", "svd", "shared_basis", "mobe")
KEPT = (1.0, 0.8, 0.6, 0.47, 0.35)
SIZES = r"[01](\.\d+)?=[1-9]\d*,[1-9]\d*(,[1-9]\d*)?"
CPU = torch.device("cpu")
Cells = dict[tuple[str, float], dict[str, Any]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=str(_DATA / "globe-ref"),
        help="folder; left out, globe-ref beside the project",
    )
    parser.add_argument("--text", default=str(_DATA / "heldout.txt"), help="held-out text, or embedded")
    parser.add_argument("--max-tokens", type=int, help="of the text, spread over it; left out, all")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--calibrate", help="text that methods with +inputs are calibrated on")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), help="of conf/method, or METHOD+METRIC"
    )
    parser.add_argument(
        "--prune", nargs="*", type=float, default=[], help="shares of the experts that are dropped, as 0.25"
    )
    parser.add_argument("--kept", nargs="+", type=float, default=list(KEPT))
    parser.add_argument("--layers", default="all", help="as layer= of globe.train")
    parser.add_argument("--families", default="both", choices=("both", "up", "gate", "down", "all"))
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for each matrix, of methods that iterate"
    )
    parser.add_argument(
        "--steps", type=int, help="for each matrix, instead of seconds: the same on any machine"
    )
    parser.add_argument(
        "--adam-seconds",
        type=float,
        help="for each matrix, of methods trained by Adam, in the place of steps",
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of every method")
    parser.add_argument("--globe", nargs="+", default=[], metavar="KEY=VALUE", help="options of GloBE alone")
    parser.add_argument(
        "--globe-sizes",
        nargs="+",
        default=[],
        metavar="KEPT=M,R[,K]",
        help="atoms and rows of GloBE's banks at a share",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-perplexity"))
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    options = parser.parse_args()
    if options.calibrate is None and (
        options.prune or any(one.endswith("+inputs") for one in options.methods)
    ):
        parser.error("--prune and methods in the metric of inputs need --calibrate")
    for given in options.globe_sizes:
        if not re.fullmatch(SIZES, given):
            parser.error(
                f"--globe-sizes {given} is not understood: give KEPT=M,R or KEPT=M,R,K, such as 0.47=15,88"
            )
    return options


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What all cells share."""

    options: argparse.Namespace
    original: Any
    copy: Any
    tokens: Tokens
    windows: tuple[Window, ...]
    settings: dict[str, Any]
    """all that a cell's figures depend on, besides its method and share"""
    logits: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """of the original, by the group of windows"""

    def remembered(self, group: Sequence[Window], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute the original's logits once for all cells."""
        key = (group[0].start, group[-1].stop)
        if key not in self.logits:
            self.logits[key] = compute()
        return self.logits[key]


def prepare(options: argparse.Namespace) -> Bench:
    checkpoint = open_checkpoint(options.checkpoint)
    subject = Subject(options.checkpoint, checkpoint.folder, checkpoint)
    text = read_text(options.text)
    tokens = tokenise(text.content, load_tokenizer(subject, None, None))
    windows = spread_windows(
        tokens.ids.shape[0], options.max_tokens, window=options.window, stride=options.stride
    )
    original, copy = (subject.load(dtype=torch.float32, device=CPU, S_cache=None) for _ in range(2))
    check_model(original, int(tokens.ids.max()), options.window, original=None)
    settings = {
        "weights": checkpoint.hash_tensors(checkpoint.reader.names),
        "text": text.sha256,
        "tokens": sum(window.scored for window in windows),
        "spread": len(windows),
        "window": options.window,
        "stride": options.stride,
        "seed": options.seed,
    }
    return Bench(options, original, copy, tokens, windows, settings)


def spread_windows(total: int, most: int | None, *, window: int, stride: int) -> tuple[Window, ...]:
    """Sliding windows over `most` of `total` tokens, in stretches of about four windows that are spread evenly.

    The beginning of a text may be of one book alone, and say nothing of the others. None takes all tokens.
    """
    if most is None or most >= total:
        return sliding_windows(total, window=window, stride=stride)
    stretches = max(1, most // (4 * window))
    length = most // stretches
    found = []
    for number in range(stretches):
        start = number * (total - length) // max(1, stretches - 1)
        inside = sliding_windows(length, window=window, stride=stride)
        found += [Window(start + one.start, start + one.stop, one.scored) for one in inside]
    return tuple(found)


def composed(options: argparse.Namespace, method: str, kept: float) -> DictConfig:
    """The configuration of one cell's run."""
    name, _, metric = method.partition("+")
    limit, seconds = [f"train.steps={options.steps}"], options.seconds
    adam = name in ADAM and options.adam_seconds is not None
    if options.steps is None or adam:
        limit = ["train.steps=1000000", f"train.time_limit={options.adam_seconds if adam else seconds:g}"]
    overrides = [
        f"method={name}",
        f"model.path={Path(options.checkpoint).resolve()}",
        f"layer={options.layers}",
        f"family={options.families}",
        f"seed={options.seed}",
        f"threads={options.threads}",
        "train.patience=0",
        *limit,
        *(calibration(options) if metric == "inputs" else []),
        *([f"normalise.metric={metric}"] if metric else []),
        *options.set,
        *(options.globe if name == "globe" else []),
    ]
    if name == "globe" and (given := globe_sizes(options, kept)) is not None:
        named = zip(("m", "r", "atom_rank"), given, strict=False)
        overrides += [f"bank.{name}={size}" for name, size in named]
    else:
        overrides.append(f"bank.kept={kept:g}")
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("config", overrides=overrides)


def calibration(options: argparse.Namespace) -> list[str]:
    text = options.calibrate
    path = text if text == "embedded" else Path(text).resolve()
    return [f"calibrate.text={path}", f"calibrate.out={options.out / 'calibration'}"]


def globe_sizes(options: argparse.Namespace, kept: float) -> tuple[int, ...] | None:
    """m, r and perhaps k as --globe-sizes says; None leaves them to the search."""
    for given in options.globe_sizes:
        share, _, sizes = given.partition("=")
        if float(share) == kept:
            return tuple(int(size) for size in sizes.split(","))
    return None


def cell_file(options: argparse.Namespace, method: str, kept: float) -> Path:
    return options.out / "cells" / f"{method}-{kept:g}.json"


def finished(options: argparse.Namespace, method: str, kept: float, settings: dict[str, Any]) -> dict | None:
    """A cell that was done with the same settings before."""
    cell = read_record(cell_file(options, method, kept))
    return cell if cell is not None and cell["settings"] == settings else None


def do_cell(bench: Bench, method: str, kept: float) -> dict[str, Any]:
    """Learn what is not learned yet, measure, keep."""
    options = bench.options
    node = composed(options, method, kept)
    mark = identity(plain(node))
    settings = bench.settings | {"run": mark}
    if (cell := finished(options, method, kept, settings)) is not None:
        return cell
    searched = method.partition("+")[0] == "globe" and globe_sizes(options, kept) is None
    for bank in () if searched else plan(to_config(node), open_checkpoint(options.checkpoint)):
        if bank.kept > kept:
            raise ConfigError(
                f"{method} would keep {bank.kept:.4f} of {bank.key}, more than the {kept:g} of the other methods: give "
                "smaller --globe-sizes"
            )
    folder = options.out / "runs" / f"{method}-{kept:g}-{mark}"
    started = time.process_time()
    with redirect_stdout(sys.stderr):  # only the tables go to where a file may be
        globe.train.run(node, folder)
    spent = time.process_time() - started
    summary = read_summary(folder / "summary.json")
    assert summary is not None
    bench.copy.load_state_dict(bench.original.state_dict())
    patch_model(bench.copy, folder, dense=True)
    clock = time.perf_counter()
    sums = score(
        bench.copy,
        bench.tokens,
        bench.windows,
        original=bench.original,
        batch=options.batch,
        remembered=bench.remembered,
    )
    assert sums.kl is not None
    assert sums.agreement is not None
    assert sums.nll_original is not None
    blocks = activation_errors(
        bench.original, bench.copy, bench.tokens, bench.windows, batch=options.batch, device=CPU
    )
    cell = {
        "method": method,
        "asked": kept,
        "settings": settings,
        "kept": summary.kept,
        "kept_of_model": summary.kept_model(),
        "relfrob": summary.relfrob,
        "block_error": sum(one.block for one in blocks) / len(blocks),
        "sizes": {bank.key: [bank.m, bank.r] for bank in summary.banks},
        "seconds": {key: one.seconds for key, one in summary.runtimes.items()},
        "processor_seconds": spent,
        "seconds_evaluation": time.perf_counter() - clock,
        "original": asdict(perplexity(sums.nll_original, sums, seed=options.seed)),
        "perplexity": asdict(perplexity(sums.nll, sums, seed=options.seed)),
        "rise": asdict(rise(sums, seed=options.seed)),
        "divergence": asdict(divergence(sums.kl, sums.agreement, sums.tokens, seed=options.seed)),
    }
    file = cell_file(options, method, kept)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, json.loads(json.dumps(cell)))
    return cell


def pruned_model(original: Any, found: Calibration, share: float) -> Any:
    """Return a copy of a model without the share of its experts, layer by layer, whose mean of REAP is the least.

    REAP (arXiv 2510.13999): the mean over an expert's tokens of its gate value times the norm of its output. The router
    goes without them too.
    """
    model = copy.deepcopy(original)
    for layer, name in experts_modules(model).items():
        s = found.layer(layer)
        score_of = s.reap / s.counts.clamp_min(1)
        left = score_of.argsort(descending=True)[: round(len(score_of) * (1 - share))].sort().values
        experts, router = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0]).gate
        for module, weights in ((experts, ("gate_up_proj", "down_proj")), (router, ("weight",))):
            for weight in weights:
                setattr(module, weight, torch.nn.Parameter(getattr(module, weight).detach()[left]))
            module.num_experts = len(left)
    return model


def statistics_of(checkpoint: str, overrides: Sequence[str]) -> Calibration:
    """Return the statistics of a model on the text that `calibrate.text=` among the overrides names."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = to_config(compose("config", overrides=list(overrides)))
    return calibrate(open_checkpoint(checkpoint), config.calibrate)


def pruned(bench: Bench, share: float) -> str:
    """Return one line on what is left of the model without a share of its experts."""
    options = bench.options
    model = pruned_model(bench.original, statistics_of(options.checkpoint, calibration(options)), share)
    sums = score(
        model,
        bench.tokens,
        bench.windows,
        original=bench.original,
        batch=options.batch,
        remembered=bench.remembered,
    )
    assert sums.kl is not None
    assert sums.agreement is not None
    far = divergence(sums.kl, sums.agreement, sums.tokens, seed=options.seed)
    return (
        f"- {share:.0%} of the experts pruned by REAP's score: perplexity "
        f"{perplexity(sums.nll, sums, seed=options.seed).perplexity:.2f}, KL {far.kl:.5f}"
    )


@contextmanager
def processor_seconds() -> Iterator[None]:
    """Fits count their limits in seconds of the processor, of all threads."""
    modules = ((globe.fit.one_bank, "fit_bank"), (globe.fit.baseline, "Limits"))
    before = [getattr(module, name) for module, name in modules]
    for (module, name), function in zip(modules, before, strict=True):
        setattr(module, name, functools.partial(function, clock=time.process_time))
    try:
        yield
    finally:
        for (module, name), function in zip(modules, before, strict=True):
            setattr(module, name, function)


def markdown(cells: Cells, methods: Sequence[str], kept: Sequence[float]) -> str:
    """Tables with a row a method and a column a share for each figure, the best in bold."""
    lines = []
    if cells:
        one = next(iter(cells.values()))
        settings = one["settings"]
        lines.append(
            f"Original: perplexity {one['original']['perplexity']:.2f} on {settings['tokens']:,} tokens spread over "
            f"the text (window {settings['window']}, stride {settings['stride']})."
        )
    for title, figure, form in (
        ("perplexity", lambda cell: cell["perplexity"]["perplexity"], "{:.2f}"),
        ("KL(original to compressed), nats", lambda cell: cell["divergence"]["kl"], "{:.5f}"),
        (
            "another likeliest token, %",
            lambda cell: 100 - 100 * cell["divergence"]["top1_agreement"],
            "{:.2f}",
        ),
        ("error of a MoE block, mean over layers", lambda cell: cell["block_error"], "{:.4f}"),
        ("RelFrob", lambda cell: cell["relfrob"], "{:.4f}"),
        ("processor seconds", lambda cell: cell.get("processor_seconds", math.nan), "{:.0f}"),
    ):
        lines += ["", f"| {title}; kept: | " + " | ".join(f"{share:g}" for share in kept) + " |"]
        lines.append("|---" * (1 + len(kept)) + "|")
        for method in methods:
            row = [_shown(cells, method, share, methods, figure, form) for share in kept]
            lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _shown(cells: Cells, method: str, share: float, methods: Sequence[str], figure: Any, form: str) -> str:
    if (method, share) not in cells:
        return "-"
    shown = {one: form.format(figure(cells[one, share])) for one in methods if (one, share) in cells}
    best = min(shown.values(), key=float)
    return f"**{best}**" if shown[method] == best else shown[method]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    cells: Cells = {}
    if options.table:
        for method in options.methods:
            for kept in options.kept:
                if (cell := read_record(cell_file(options, method, kept))) is not None:
                    cells[method, kept] = cell
        if len({json.dumps(cell["settings"] | {"run": ""}) for cell in cells.values()}) > 1:
            raise ConfigError(f"--out {options.out} holds cells of several texts or models: give one of each")
    else:
        bench = prepare(options)
        with processor_seconds():
            for method, kept in ((method, kept) for kept in options.kept for method in options.methods):
                cells[method, kept] = do_cell(bench, method, kept)
                print(f"{method} {kept:g}: {summary_line(cells[method, kept])}", file=sys.stderr, flush=True)
    print(markdown(cells, options.methods, options.kept))
    for share in () if options.table else options.prune:
        print(pruned(bench, share))


def summary_line(cell: dict[str, Any]) -> str:
    return (
        f"kept {cell['kept']:.4f}, RelFrob {cell['relfrob']:.4f}, perplexity {cell['perplexity']['perplexity']:.3f}, "
        f"KL {cell['divergence']['kl']:.5f}"
    )


if __name__ == "__main__":
    try:
        main()
    except GlobeError as error:
        sys.exit(explain(error))
