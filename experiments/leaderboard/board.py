"""Model x method x bytes: perplexity, divergence, error, seconds and memory, and the front over bytes as a picture.

    python experiments/leaderboard/board.py [CHECKPOINT ...] [--text TEXT] [--tokens 20000] [--only WORD]

Every row is a run of globe.train over up and gate of all layers, whose banks are put dense into the model in memory.
Rows that results.json holds already are not measured again, and unfinished runs go on, so the command can be stopped
and repeated; a row is measured again when its options change. Without a checkpoint the embedded model is measured. No
method sees a text; `intro.md` says what was chosen on which. Seconds are those of a run on one thread, search
included, memory is its peak.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from globe.checkpoint import open_checkpoint
from globe.embedded import path, text_path
from globe.evaluation.divergence import divergence
from globe.evaluation.perplexity import score
from globe.evaluation.subject import Subject, load_tokenizer
from globe.evaluation.text import read_text, sliding_windows, tokenise
from globe.files import write_json
from globe.hf import patch_model
from globe.hf.structure import experts_modules
from globe.runs.summary import read_summary

HERE = Path(__file__).resolve().parent
RESULTS, TABLE, PICTURE = HERE / "results.json", HERE / "README.md", HERE / "front.svg"
NO_TEXT = "normalise.metric=experts"
LINEAR = "bank.activation=identity"


@dataclass(frozen=True)
class Row:
    """A method at one size."""

    method: str
    size: str
    options: tuple[str, ...]


def rows() -> list[Row]:
    """Return what is measured, those methods first that the table is about."""
    one_atom = ("bank.m=1", "bank.r=p", "train.steps=1", LINEAR, NO_TEXT)
    found = [
        Row("GloBE, one linear atom", f"r=p, {bits}", (f"bank.bits={bits}", *one_atom))
        for bits in (2.85, 2.15, 4.15)
    ]
    for bits in (2, 3, 4):
        few = f"bank.bits={bits}"
        found += [
            Row("RTN", f"{bits} bit", ("method=rtn", few)),
            Row("GPTQ", f"{bits} bit", ("method=gptq", few, NO_TEXT)),
            Row("GPTQ, rotated", f"{bits} bit", ("method=gptq_rotated", few, NO_TEXT)),
        ]
    found += [
        Row(
            "GloBE, linear, sizes searched",
            f"size {size}",
            (f"bank.size={size}", "train.steps=12", LINEAR, NO_TEXT),
        )
        for size in (0.1375, 0.106, 0.19375)
    ]
    found += [
        Row(
            "SVD, rounded",
            f"kept 0.5, {bits} bit",
            ("method=svd", "bank.kept=0.5", f"bank.bits={bits}", NO_TEXT),
        )
        for bits in (4,)
    ]
    found += [
        Row("GloBE, tanh", "size 0.1375", ("bank.size=0.1375", "bank.activation=tanh", NO_TEXT)),
        Row("shared basis, bfloat16", "kept 0.35", ("method=shared_basis", "bank.kept=0.35", NO_TEXT)),
        Row("GloBE, tanh, bfloat16", "kept 0.47", ("bank.activation=tanh", "train.steps=30", NO_TEXT)),
    ]
    return found


class Bench:
    """One model with its text, and the logits of the original, which are computed once."""

    def __init__(self, checkpoint: Path, text: Path, count: int) -> None:
        opened = open_checkpoint(str(checkpoint))
        subject = Subject(str(checkpoint), opened.folder, opened)
        self.path, self.name = checkpoint, checkpoint.resolve().name
        self.model: Any = subject.load(dtype=torch.float32, device=torch.device("cpu"), S_cache=None).eval()
        self.tokens = tokenise(
            read_text(str(text)).content, load_tokenizer(subject, None, None), max_tokens=count
        )
        self.windows = sliding_windows(self.tokens.ids.shape[0], window=256, stride=128)
        modules = [self.model.get_submodule(name) for name in experts_modules(self.model).values()]
        self.held = [(module.gate_up_proj, module.gate_up_proj.detach().clone()) for module in modules]
        self.logits: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def measure(self, run: Path | None) -> dict[str, float]:
        """Return perplexity, divergence from the original and agreement with it; None measures the original itself."""
        for parameter, original in self.held:
            parameter.copy_(original)
        if run is not None:
            patch_model(self.model, str(run), dense=True)

        def remembered(group: Any, compute: Any) -> Tensor:
            key = (group[0].start, group[-1].stop)
            if key not in self.logits:
                self.logits[key] = compute()
            return self.logits[key]

        sums = score(self.model, self.tokens, self.windows, original=self.model, remembered=remembered)
        apart = divergence(sums.kl, sums.agreement, sums.tokens, seed=0)
        return {
            "perplexity": math.exp(float(sums.nll.sum() / sums.tokens.sum())),
            "kl": apart.kl,
            "kl_low": apart.kl_interval.low,
            "kl_high": apart.kl_interval.high,
            "top1": float(sums.agreement.sum() / sums.tokens.sum()),
        }


def fit(bench: Bench, row: Row, runs: Path) -> tuple[Path, dict[str, float]]:
    """Do the run of a row in a process of its own, and return its folder and figures."""
    folder = runs / bench.name / f"{row.method}-{row.size}".replace(" ", "-").replace(",", "")
    command = [sys.executable, "-m", "globe.train", f"model.path={bench.path}", "family=both", "layer=all"]
    command += ["threads=1", *row.options, f"hydra.run.dir={folder}"]
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


def table(results: list[dict[str, Any]]) -> str:
    """Return the rows of every model by bytes; bold are those on the front."""
    text = (HERE / "intro.md").read_text()
    for model in dict.fromkeys(one["model"] for one in results):
        points = sorted((one for one in results if one["model"] == model), key=lambda one: one["bytes"])
        best = front(points)
        text += f"\n## {model}\n\n{points[0]['tokens']:,} tokens; the original has a perplexity of "
        text += f"{points[0]['perplexity_original']:.2f}.\n\n"
        text += "| bits | of bf16 | method | size | KL (95 %) | perplexity | top-1 | RelFrob | s | MiB |\n"
        text += "|---" * 10 + "|\n"
        for one in points:
            mark = "**" if one in best else ""
            text += (
                f"| {one['bits']:.2f} | {one['share']:.3f} | {mark}{one['method']}{mark} | {one['size']} | "
                f"{mark}{one['kl']:.5f}{mark} ({one['kl_low']:.5f} to {one['kl_high']:.5f}) | "
                f"{one['perplexity']:.2f} | {one['top1']:.2%} | {one['relfrob']:.4f} | {one['seconds']:.0f} | "
                f"{one['memory_mib']:.0f} |\n"
            )
    return text


def draw(results: list[dict[str, Any]]) -> None:
    """Draw divergence over bits a weight, both logarithmic, with the front of each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "globe"
    models = list(dict.fromkeys(one["model"] for one in results))
    figure, axes = plt.subplots(1, len(models), figsize=(6.4 * len(models), 4.8), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        points = [one for one in results if one["model"] == model]
        for method in dict.fromkeys(one["method"] for one in points):
            own = sorted((one for one in points if one["method"] == method), key=lambda one: one["bits"])
            axis.plot([one["bits"] for one in own], [one["kl"] for one in own], "o-", label=method, ms=5)
        best = front(points)
        axis.step(
            [one["bits"] for one in best], [one["kl"] for one in best], "k:", where="post", label="front"
        )
        axis.set(
            xscale="log", yscale="log", xlabel="bits a weight of up and gate", ylabel="KL (nats)", title=model
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
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--only", default="", help="measure methods whose name holds this word")
    parser.add_argument("--runs", type=Path, default=Path("outputs/leaderboard"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for checkpoint in given.checkpoints or [path()]:
        bench = Bench(checkpoint, given.text or text_path(), given.tokens)
        setting = {"tokens": given.tokens, "text": (given.text or text_path()).name}
        todo = [
            one
            for one in rows()
            if given.only in one.method and not measured(results, bench.name, one, setting)
        ]
        original = bench.measure(None) if todo else {}
        for row in todo:
            folder, figures = fit(bench, row, given.runs)
            figures |= bench.measure(folder) | {"perplexity_original": original["perplexity"]}
            same = (bench.name, row.method, row.size)
            results = [one for one in results if (one["model"], one["method"], one["size"]) != same]
            results.append(
                {"model": bench.name, "method": row.method, "size": row.size, "options": list(row.options)}
                | setting
                | figures
            )
            write_json(RESULTS, results)
            print(
                f"{bench.name} {row.method} {row.size}: {figures['bits']:.2f} bits, KL {figures['kl']:.5f}",
                flush=True,
            )
    TABLE.write_text(table(results))
    draw(results)
    print(f"written: {TABLE}, {PICTURE}")


if __name__ == "__main__":
    main()
