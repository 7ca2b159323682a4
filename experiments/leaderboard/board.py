"""Model x method x bytes: perplexity, divergence, error, seconds and memory, and the front over bytes as a picture.

    python experiments/leaderboard/board.py [CHECKPOINT ...] [--text TEXT] [--calibrate TEXT] [--only WORD]

Every row is a run of globe.train, whose banks are put dense into the model in memory: up and gate of all layers from
weights alone, and with --calibrate also all three families in the metric of each expert's own inputs on that text. Rows
that results.json holds already are not measured again, and unfinished runs go on, so the command can be stopped and
repeated; a row is measured again when its options change. Without a checkpoint the embedded model is measured.
`intro.md` says what was chosen on which text. Seconds are those of a run on one thread, search included, memory is its
peak.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from perplexity import pruned_model, statistics_of

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

HERE = Path(__file__).resolve().parent
RESULTS, TABLE, PICTURE = HERE / "results.json", HERE / "README.md", HERE / "front.svg"
NO_TEXT = "normalise.metric=experts"
LINEAR = "bank.activation=identity"
ONE_BUDGET = ("budget.over=model",)
TANH = ("bank.activation=tanh", "train.steps=25")
KINDS = {"weights": "up and gate, weights alone", "calibrated": "all three families, calibrated"}


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
        Row(f"{title}, rounded", f"kept {kept}, {bits} bit", (f"method={name}", *sized, *metric))
        for title, name in (("shared basis", "shared_basis"), ("SVD", "svd"))
        for kept, bits in (("0.5", 4), ("0.65", 3))
        for sized in [(f"bank.kept={kept}", f"bank.bits={bits}", "bank.group_A=64")]
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


def fit(bench: Bench, row: Row, runs: Path, given: Sequence[str]) -> tuple[Path, dict[str, float]]:
    """Do the run of a row in a process of its own, and return its folder and figures."""
    families = "both" if NO_TEXT in row.options and "calibrate.text" not in " ".join(given) else "all"
    name = f"{families}-{row.method}-{row.size}".replace(" ", "-").replace(",", "")
    folder = runs / bench.name / name
    command = [sys.executable, "-m", "globe.train", f"model.path={bench.path}", f"family={families}"]
    command += ["layer=all", "threads=1", *row.options, f"hydra.run.dir={folder}"]
    command += [] if NO_TEXT in row.options else given
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
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


def row_figures(bench: Bench, row: Row, runs: Path, given: Sequence[str]) -> dict[str, Any]:
    """Return all that the table says of a row."""
    if row.pruned is None:
        folder, figures = fit(bench, row, runs, given)
        return figures | bench.measure(folder)
    bench.measure(None)
    found = statistics_of(str(bench.path), given)
    left = pruned_model(bench.model, found, row.pruned)
    share = 1 - row.pruned
    figures = {"bytes": 2 * share * bench.experts, "bits": 16 * share, "share": share, "relfrob": None}
    return figures | {"seconds": 0.0, "memory_mib": 0.0} | bench.measure(None, left)


def measured(results: list[dict[str, Any]], model: str, row: Row, setting: dict[str, Any]) -> bool:
    """Return whether a row is there, with the same options and text."""
    wanted = {"model": model, "method": row.method, "size": row.size, "options": list(row.options), **setting}
    return any(all(one.get(key) == value for key, value in wanted.items()) for one in results)


def front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that no other one beats in both bytes and divergence, from the smallest."""
    best: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda one: (one["bytes"], one["kl"])):
        if not best or point["kl"] < best[-1]["kl"]:
            best.append(point)
    return best


def boards(results: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Return the rows of every model and kind by bytes."""
    places = dict.fromkeys((one["model"], one["kind"]) for one in results)
    return [
        (
            model,
            kind,
            sorted((one for one in results if (one["model"], one["kind"]) == (model, kind)), key=_bytes),
        )
        for model, kind in places
    ]


def _bytes(one: dict[str, Any]) -> float:
    return one["bytes"]


def table(results: list[dict[str, Any]]) -> str:
    """Return the rows of every model by bytes; bold are those on the front."""
    text = (HERE / "intro.md").read_text()
    for model, kind, points in boards(results):
        best = front(points)
        text += f"\n## {model}, {KINDS[kind]}\n\n{points[0]['tokens']:,} tokens; the original has a perplexity of "
        text += f"{points[0]['perplexity_original']:.2f}.\n\n"
        text += "| bits | of bf16 | method | size | KL (95 %) | perplexity | top-1 | RelFrob | s | MiB |\n"
        text += "|---" * 10 + "|\n"
        for one in points:
            mark = "**" if one in best else ""
            run = one["relfrob"] is not None
            text += (
                f"| {one['bits']:.2f} | {one['share']:.3f} | {mark}{one['method']}{mark} | {one['size']} | "
                f"{mark}{one['kl']:.5f}{mark} ({one['kl_low']:.5f} to {one['kl_high']:.5f}) | "
                f"{one['perplexity']:.2f} | {one['top1']:.2%} | "
            )
            text += (
                f"{one['relfrob']:.4f} | {one['seconds']:.0f} | {one['memory_mib']:.0f} |\n"
                if run
                else "- | - | - |\n"
            )
    return text


def draw(results: list[dict[str, Any]]) -> None:
    """Draw divergence over bits a weight, both logarithmic, with the front of each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "globe"
    found = boards(results)
    down = -(-len(found) // 2)
    figure, axes = plt.subplots(down, min(2, len(found)), figsize=(12.8, 4.8 * down), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    methods = dict.fromkeys(one["method"] for _, _, points in found for one in points)
    palette = plt.get_cmap("tab10" if len(methods) <= 10 else "tab20").colors
    colours = dict(zip(methods, palette, strict=False))  # the same in all pictures
    for axis, (model, kind, points) in zip(axes.flat, found, strict=False):
        for method in dict.fromkeys(one["method"] for one in points):
            own = sorted((one for one in points if one["method"] == method), key=lambda one: one["bits"])
            bits, kl = ([one[name] for one in own] for name in ("bits", "kl"))
            axis.plot(bits, kl, "o-", label=method, ms=5, color=colours.get(method))
        best = front(points)
        axis.step(
            [one["bits"] for one in best], [one["kl"] for one in best], "k:", where="post", label="front"
        )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="bits a weight",
            ylabel="KL (nats)",
            title=f"{model}, {KINDS[kind]}",
        )
        ticks = (1.5, 2, 3, 4, 6, 8)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "--text", type=Path, help="text that nothing was fitted to; default the package's own"
    )
    parser.add_argument("--calibrate", help="text that statistics are taken on, for the rows of all families")
    parser.add_argument(
        "--first", type=int, default=0, help="tokens of the text to leave out, as others chose on them"
    )
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--only", default="", help="measure methods whose name holds this word")
    parser.add_argument("--kind", choices=KINDS, help="measure these rows alone")
    parser.add_argument("--runs", type=Path, default=Path("outputs/leaderboard"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    kinds = [given.kind] if given.kind else ["weights"] + ["calibrated"] * (given.calibrate is not None)
    for checkpoint in given.checkpoints or [path()]:
        bench = Bench(checkpoint, given.text or text_path(), given.first, given.tokens)
        for kind in kinds:
            results = measure_kind(bench, kind, given, results)
    TABLE.write_text(table(results))
    draw(results)
    print(f"written: {TABLE}, {PICTURE}")


def measure_kind(
    bench: Bench, kind: str, given: argparse.Namespace, results: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure what is missing of one kind of rows, and return all results."""
    setting = {"kind": kind, "tokens": given.tokens, "first": given.first}
    setting |= {"text": (given.text or text_path()).name}
    overrides: list[str] = []
    if kind == "calibrated":
        setting["calibrate"] = Path(given.calibrate).name
        text = given.calibrate if given.calibrate == "embedded" else Path(given.calibrate).resolve()
        overrides = [f"calibrate.text={text}", f"calibrate.out={given.runs / bench.name / 'calibration'}"]
    todo = [
        one
        for one in rows(calibrated=kind == "calibrated")
        if given.only in one.method and not measured(results, bench.name, one, setting)
    ]
    original = bench.measure(None) if todo else {}
    for row in todo:
        figures = row_figures(bench, row, given.runs, overrides)
        figures |= {"perplexity_original": original["perplexity"]}
        same = (bench.name, kind, row.method, row.size)
        results = [one for one in results if (one["model"], one["kind"], one["method"], one["size"]) != same]
        own = {"model": bench.name, "method": row.method, "size": row.size, "options": list(row.options)}
        results.append(own | setting | figures)
        write_json(RESULTS, results)
        print(
            f"{bench.name} {row.method} {row.size}: {figures['bits']:.2f} bits, KL {figures['kl']:.5f}",
            flush=True,
        )
    return results


if __name__ == "__main__":
    main()
