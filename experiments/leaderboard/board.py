"""Model x method x bytes: perplexity, divergence, error, seconds and memory, and the front over bytes as a picture.

    python experiments/leaderboard/board.py [CHECKPOINT ...] [--text TEXT] [--calibrate TEXT] [--only WORD]

Every row is a run of globe.train, whose banks are put dense into the model in memory: up and gate of all layers from
weights alone, and with --calibrate also all three families in the metric of each expert's own inputs on that text. Rows
that results.json holds already are not measured again, and unfinished runs go on, so the command can be stopped and
repeated; a row is measured again when its options change. Without a checkpoint the embedded model is measured, and
calibrated on the package's own text.
`intro.md` says what was chosen on which text. Seconds are those of a run on one thread, search included, memory is its
peak.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from pages import KINDS, PICTURE, README, TABLE, write_pages
from perplexity import pruned_model, statistics_of

import globe.train
from globe.calibration.experts_module import experts_modules
from globe.calibration.text import Tokens, tokenise
from globe.checkpoint import open_checkpoint
from globe.embedded import path, text_path
from globe.evaluation.divergence import divergence
from globe.evaluation.perplexity import score
from globe.evaluation.subject import Subject, load_tokenizer
from globe.evaluation.text import read_text, sliding_windows
from globe.files import write_json
from globe.hf import patch_model
from globe.runs.summary import read_summary

RESULTS = TABLE.with_name("results.json")
APART = multiprocessing.get_context("forkserver")
"""Runs begin in a process that holds no model, so that their memory is theirs, with all modules loaded already."""
APART.set_forkserver_preload(["globe.train", "globe.hf", "globe.evaluation.perplexity"])
NO_TEXT = "normalise.metric=experts"
LINEAR = "bank.activation=identity"
ONE_BUDGET = ("budget.over=model",)
TANH = ("bank.activation=tanh", "train.steps=25")
GROUPS = "bank.group_A=64"
ADAM = ("bank.activation=tanh", "train.steps=200", GROUPS)
FACTORS: tuple[tuple[str, tuple[str, ...], tuple[tuple[float, int, int], ...]], ...] = (
    ("shared basis", ("method=shared_basis", GROUPS), ((0.65, 3, 8), (0.5, 3, 8), (0.7, 4, 8))),
    ("SVD", ("method=svd", GROUPS), ((0.65, 3, 3), (0.7, 4, 4))),
    ("MoBE form", ("method=mobe_corrected", *ADAM), ((0.45, 4, 5), (0.6, 4, 6))),
    ("SLBF form", ("method=slbf", *ADAM), ((0.45, 4, 5), (0.6, 4, 6))),
)
"""Forms whose factors are rounded: their options, and shares of numbers kept with bits of adapters and of atoms."""


@dataclass(frozen=True)
class Row:
    """A method at one size."""

    method: str
    size: str
    options: tuple[str, ...] = ()
    pruned: float | None = None
    """share of the experts that go, for a row that is no run"""


def rows(*, calibrated: bool = False) -> list[Row]:
    """Return what is measured, those methods first that the table is about.

    `calibrated` rows are of all three families, in the metric of inputs; the others know weights alone.
    """
    metric = () if calibrated else (NO_TEXT,)
    one_atom = ("bank.m=1", "bank.r=d", "train.steps=3", LINEAR, *metric)
    shares = (0.14, 0.12, 0.18, 0.15) if calibrated else (0.1375, 0.19375, 0.10625)
    found = [
        Row(title, f"{share:g} of the bytes", (f"bank.size={share}", *one_atom, *ONE_BUDGET, *coded))
        for title, coded in (
            ("GloBE, one square atom, coded", ("bank.coded=true",)),
            ("GloBE, one square atom", ()),
        )
        for share in shares
    ]
    found.append(
        Row("GloBE, equal bytes for all banks", f"{shares[0]:g} each", (f"bank.size={shares[0]}", *one_atom))
    )
    found += [
        Row(
            f"{title}, bits by row",
            f"{share:g} of the bytes",
            (f"method={name}", "bank.bits=null", f"bank.size={share}", *metric, *ONE_BUDGET),
        )
        for share in shares
        for title, name in (("GPTQ", "gptq"), ("GPTQ, rotated", "gptq_rotated"))
    ]
    for bits in (2, 3, 4):
        few = f"bank.bits={bits}"
        fed = (few, "normalise.metric=inputs" if calibrated else NO_TEXT)
        found += [
            Row("RTN", f"{bits} bit", ("method=rtn", few, NO_TEXT)),
            Row("GPTQ", f"{bits} bit", ("method=gptq", *fed)),
            Row("GPTQ, rotated", f"{bits} bit", ("method=gptq_rotated", *fed)),
        ]
    found += [
        Row(
            f"{title}, rounded",
            f"kept {kept:g}, {few} and {more} bit",
            (f"bank.kept={kept:g}", f"bank.bits_A={few}", f"bank.bits_B={more}", *options, *metric),
        )
        for title, options, sizes in FACTORS
        for kept, few, more in sizes
    ]
    found += [
        Row("shared basis, bfloat16", "kept 0.35", ("method=shared_basis", "bank.kept=0.35", *metric)),
        Row("GloBE, tanh, bfloat16", "m=8, r=p/2", ("bank.m=8", "bank.r=p/2", *TANH, *metric)),
    ]
    if calibrated:
        found += [Row("pruned by REAP", f"{share:.0%} gone", pruned=share) for share in (0.25, 0.5)]
    return found


class Bench:
    """One model with its text, and the logits of the original, which are computed once."""

    def __init__(self, checkpoint: Path, text: Path, first: int, count: int) -> None:
        opened = open_checkpoint(str(checkpoint))
        subject = Subject(str(checkpoint), opened.folder, opened)
        self.path, self.name = checkpoint, checkpoint.resolve().name
        self.model: Any = subject.load(dtype=torch.float32, device=torch.device("cpu"), S_cache=None).eval()
        whole = tokenise(
            read_text(str(text)).content, load_tokenizer(subject, None, None), max_tokens=first + count
        )
        self.tokens = Tokens(whole.ids[first:], whole.bytes[first:])
        self.windows = sliding_windows(self.tokens.ids.shape[0], window=256, stride=128)
        modules = [self.model.get_submodule(name) for name in experts_modules(self.model).values()]
        weights = [one for module in modules for one in (module.gate_up_proj, module.down_proj)]
        self.held = [(weight, weight.detach().clone()) for weight in weights]
        self.experts = sum(weight.numel() for weight in weights)
        self.logits: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def measure(self, run: Path | None, other: Any = None) -> dict[str, float]:
        """Return perplexity, divergence from the original and agreement with it, of a run or another model.

        None measures the original itself.
        """
        for parameter, original in self.held:
            parameter.copy_(original)
        if run is not None:
            patch_model(self.model, str(run), dense=True)

        def remembered(group: Any, compute: Any) -> Tensor:
            key = (group[0].start, group[-1].stop)
            if key not in self.logits:
                self.logits[key] = compute()
            return self.logits[key]

        sums = score(
            other or self.model, self.tokens, self.windows, original=self.model, remembered=remembered
        )
        apart = divergence(sums.kl, sums.agreement, sums.tokens, seed=0)
        return {
            "perplexity": math.exp(float(sums.nll.sum() / sums.tokens.sum())),
            "kl": apart.kl,
            "kl_low": apart.kl_interval.low,
            "kl_high": apart.kl_interval.high,
            "top1": float(sums.agreement.sum() / sums.tokens.sum()),
        }


def fit(bench: Bench, row: Row, runs: Path, given: Sequence[str]) -> tuple[Path, dict[str, float]] | None:
    """Do the run of a row in a process of its own, and return its folder and figures; None where it is refused."""
    families = "both" if NO_TEXT in row.options and "calibrate.text" not in " ".join(given) else "all"
    name = f"{families}-{row.method}-{row.size}".replace(" ", "-").replace(",", "")
    folder = runs / bench.name / name
    options = [f"model.path={bench.path}", f"family={families}", "layer=all", "threads=1", *row.options]
    options += [f"hydra.run.dir={folder}", *([] if NO_TEXT in row.options else given)]
    process = APART.Process(target=_train, args=(options,))
    process.start()
    process.join()
    if process.exitcode == 1:  # an error, which it has said
        return None
    if process.exitcode:
        raise SystemExit(f"{name} was stopped: the same command goes on there")
    summary = read_summary(folder / "summary.json")
    assert summary is not None
    weights = sum(bank.parameters for bank in summary.banks)
    held = sum(bank.metrics["bytes"] or 0 for bank in summary.banks)
    peaks = [one.peak_host_bytes or 0 for one in summary.runtimes.values()]
    return folder, {
        "bytes": held,
        "bits": 8 * held / weights,
        "share": held / (2 * weights),
        "relfrob": summary.relfrob,
        "seconds": summary.seconds,
        "memory_mib": max(peaks) / 2**20,
    }


def _train(options: list[str]) -> None:
    """Do what `python -m globe.train` does with these options, and keep its prints to itself."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.argv[1:] = options
    globe.train.main()


def row_figures(bench: Bench, row: Row, runs: Path, given: Sequence[str]) -> dict[str, Any] | None:
    """Return all that the table says of a row, None where a model has no run of it."""
    if row.pruned is None:
        found = fit(bench, row, runs, given)
        return None if found is None else found[1] | bench.measure(found[0])
    bench.measure(None)
    left = pruned_model(bench.model, statistics_of(str(bench.path), given), row.pruned)
    share = 1 - row.pruned
    figures = {"bytes": 2 * share * bench.experts, "bits": 16 * share, "share": share, "relfrob": None}
    return figures | {"seconds": 0.0, "memory_mib": 0.0} | bench.measure(None, left)


def measured(results: list[dict[str, Any]], model: str, row: Row, setting: dict[str, Any]) -> bool:
    """Return whether a row is there, with the same options and text."""
    wanted = {"model": model, "method": row.method, "size": row.size, "options": list(row.options), **setting}
    return any(all(one.get(key) == value for key, value in wanted.items()) for one in results)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "--text", type=Path, help="text that nothing was fitted to; default the package's own"
    )
    parser.add_argument(
        "--calibrate",
        help="text that statistics are taken on, for the rows of all families; embedded is the package's own",
    )
    parser.add_argument(
        "--first", type=int, default=0, help="tokens of the text to leave out, as others chose on them"
    )
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--only", default="", help="measure methods whose name holds this word")
    parser.add_argument("--kind", choices=KINDS, help="measure these rows alone")
    parser.add_argument("--runs", type=Path, default=Path("outputs/leaderboard"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.checkpoints:
        given.calibrate = given.calibrate or "embedded"
    kinds = [given.kind] if given.kind else ["weights"] + ["calibrated"] * (given.calibrate is not None)
    for checkpoint in given.checkpoints or [path()]:
        bench = Bench(checkpoint, given.text or text_path(), given.first, given.tokens)
        for kind in kinds:
            measure_kind(bench, kind, given)
    write_pages(read_results())
    print(f"written: {TABLE}, {PICTURE}, {README}")


def read_results() -> list[dict[str, Any]]:
    """Return all rows that were measured."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def measure_kind(bench: Bench, kind: str, given: argparse.Namespace) -> None:
    """Measure what is missing of one kind of rows."""
    setting = {"kind": kind, "tokens": given.tokens, "first": given.first}
    setting |= {"text": (given.text or text_path()).name}
    overrides: list[str] = []
    if kind == "calibrated":
        setting["calibrate"] = Path(given.calibrate).name
        text = given.calibrate if given.calibrate == "embedded" else Path(given.calibrate).resolve()
        overrides = [f"calibrate.text={text}", f"calibrate.out={given.runs / bench.name / 'calibration'}"]
    held = read_results()
    todo = [
        one
        for one in rows(calibrated=kind == "calibrated")
        if given.only in one.method and not measured(held, bench.name, one, setting)
    ]
    original = bench.measure(None) if todo else {}
    for row in todo:
        figures = row_figures(bench, row, given.runs, overrides)
        if figures is None:
            print(f"{bench.name} {row.method} {row.size}: no row, for the reason above", flush=True)
            continue
        figures |= {"perplexity_original": original["perplexity"]}
        same = (bench.name, kind, row.method, row.size)
        # another command may have measured other rows meanwhile
        results = [
            one for one in read_results() if (one["model"], one["kind"], one["method"], one["size"]) != same
        ]
        own = {"model": bench.name, "method": row.method, "size": row.size, "options": list(row.options)}
        results.append(own | setting | figures)
        write_json(RESULTS, results)
        print(
            f"{bench.name} {row.method} {row.size}: {figures['bits']:.2f} bits, KL {figures['kl']:.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
