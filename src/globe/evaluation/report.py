"""All figures of one evaluation, as a record, as JSON and as the table that is printed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from globe.config.console import add_row, new_table, say, show_table, wide_console
from globe.evaluation.activation_error import LayerError
from globe.evaluation.bootstrap import Interval
from globe.evaluation.divergence import Divergence
from globe.evaluation.perplexity import Perplexity, Rise
from globe.evaluation.sizes import Change, ModelSizes
from globe.evaluation.spot_checks import SpotCheck

FORMAT_VERSION = 1
TaskScores = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of one model; those that need an original beside it are None without one."""

    model: str
    original: str | None
    settings: dict[str, Any]
    """options, and what was read: text, tokens, windows, tokenizer"""
    perplexity: Perplexity
    perplexity_original: Perplexity | None
    rise: Rise | None
    divergence: Divergence | None
    activation_errors: tuple[LayerError, ...]
    spot_checks: tuple[SpotCheck, ...]
    parity_tolerance: float
    arithmetic: str
    """dtype of the model in memory"""
    sizes: ModelSizes
    tasks: TaskScores
    tasks_original: TaskScores
    seconds: float

    @property
    def is_run(self) -> bool:
        """Was it a run, patched in memory, and not a checkpoint?"""
        return bool(self.settings.get("banks"))

    @property
    def parity(self) -> float | None:
        """The largest of the spot checks; None if there is none."""
        return max((one.parity for one in self.spot_checks if one.parity is not None), default=None)

    @property
    def parity_holds(self) -> bool:
        return self.parity is None or self.parity <= self.parity_tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON; a figure that is not finite is null. Equal runs differ in `seconds` alone."""
        record = plain(asdict(self))
        sizes = record["sizes"]
        for name in ("family_parameters", "model_parameters", "family_bytes", "model_bytes"):
            change: Change | None = getattr(self.sizes, name)
            if change is not None:
                sizes[name]["ratio"] = change.ratio
        own = {"format_version": FORMAT_VERSION, "parity": self.parity, "parity_holds": self.parity_holds}
        return record | plain(own)


def plain(value: Any) -> Any:
    """Return a record as JSON holds it: lists for tuples, null for what is not finite."""
    match value:
        case dict():
            return {str(key): plain(one) for key, one in value.items()}
        case list() | tuple():
            return [plain(one) for one in value]
        case float():
            return value if math.isfinite(value) else None
    return value


def print_evaluation(result: Evaluation, file: Path | None, console: Console | None = None) -> None:
    """Print the table, what it means, and where the figures are kept. Without a terminal, lines have 120 columns."""
    console = wide_console(console)
    show_table(console, table(result))
    for line in advice(result):
        say(console, line)
    say(console, "not kept: give out=FILE to write them down" if file is None else f"written to {file}")


def advice(result: Evaluation) -> list[str]:
    """Return what the sizes mean, and what comes next, in sentences."""
    sizes = result.sizes
    after, before = sizes.resident, sizes.resident_original
    lines = []
    if after.cache:
        saved = ""
        if before is not None and after.total > before.total:
            share = (after.total - after.cache) / before.total
            saved = f", more than the original holds; without them it holds {share:.1%} of it"
        lines.append(
            f"the model in memory holds {after.cache:,} bytes of composed bases{saved} (S_cache=0 keeps none and "
            "composes at each call)"
        )
    if result.is_run:
        as_original = sizes.dense_bytes in (None, sizes.model_bytes.before)
        what = "as the original has" if as_original else "the original dequantised"
        lines.append(
            f"next: python -m globe.patch run={result.model} out=FOLDER format=globe writes files of "
            f"{sizes.model_bytes.after:,} bytes; format=dense writes {sizes.dense_bytes or 0:,}, {what}, for engines "
            "that know dense experts alone"
        )
    return lines


def table(result: Evaluation) -> Table:
    """Return one row for each figure: the original, the model, the difference."""
    settings = result.settings
    title = f"{result.model} on {settings['text']} ({settings['counted_tokens']:,} tokens)"
    headings = ("original", "model", "difference")
    made = new_table(title, ("figure", *headings), wrap=headings)
    for section in (
        _quality(result),
        _insides(result),
        _sizes(result.sizes, result.arithmetic),
        _tasks(result),
    ):
        for row in section:
            add_row(made, row)
        if section:
            made.add_section()
    return made


def _quality(result: Evaluation) -> list[tuple[str, str, str, str]]:
    own, before, rise = result.perplexity, result.perplexity_original, result.rise
    share = ""
    if rise is not None:
        percent = f"{100 * (rise.ratio - 1):+.2f} %"
        if rise.ratio_interval is not None:
            low, high = (100 * (bound - 1) for bound in rise.ratio_interval)
            percent += f", {low:+.2f} to {high:+.2f}"
        share = f"{rise.perplexity:+.4g} ({percent})"
    rows = [
        ("perplexity per token", _with_interval(before), _with_interval(own), share),
        (
            "perplexity per byte",
            "-" if before is None else f"{before.byte_perplexity:.4f}",
            f"{own.byte_perplexity:.4f}",
            "" if before is None else f"{own.byte_perplexity - before.byte_perplexity:+.4f}",
        ),
        (
            "bits per byte",
            "-" if before is None else f"{before.bits_per_byte:.4f}",
            f"{own.bits_per_byte:.4f}",
            "" if before is None else f"{own.bits_per_byte - before.bits_per_byte:+.4f}",
        ),
    ]
    if result.divergence is not None:
        far = result.divergence
        kl = _between(far.kl_interval, "{:.4g}")
        same = _between(far.top1_agreement_interval, "{:.1%}")
        rows.append(("KL(original || model), nats", "", f"{far.kl:.4g}{kl}", ""))
        rows.append(("same likeliest next token", "", f"{far.top1_agreement:.1%}{same}", ""))
    return rows


def _insides(result: Evaluation) -> list[tuple[str, str, str, str]]:
    rows = []
    touched = {layer for layer, _ in result.sizes.places}
    chosen = [one for one in result.activation_errors if not touched or one.layer in touched]
    if chosen:
        for name in ("block", "experts"):
            errors = {one.layer: getattr(one, name) for one in chosen}
            worst = max(errors, key=lambda layer: errors[layer])
            mean = sum(errors.values()) / len(errors)
            what = "MoE block" if name == "block" else "routed experts"
            rows.append(
                (f"{what}, relative error", "", f"{mean:.4f}", f"worst {errors[worst]:.4f}, layer {worst}")
            )
    checks = result.spot_checks
    if checks:
        count = len(checks)
        for name, label in (("relfrob", "RelFrob"), ("spectrum", "spectra differ by")):
            values = [getattr(one, name) for one in checks]
            rows.append(
                (f"{count} experts: {label}", "", f"{sum(values) / count:.4f}", f"worst {max(values):.4f}")
            )
        before, after = (sum(one.effective_rank[side] for one in checks) / count for side in (0, 1))
        rows.append(
            (f"{count} experts: effective rank", f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}")
        )
        for side in ("left", "right"):
            values = [getattr(one, f"alignment_{side}") for one in checks]
            label = f"{count} experts: leading {side} subspaces"
            rows.append((label, "", f"{sum(values) / count:.4f}", f"worst {min(values):.4f}"))
    if result.parity is not None:
        verdict = "holds" if result.parity_holds else f"above {result.parity_tolerance:g}"
        rows.append((f"{len(checks)} experts: parity of the product", "", f"{result.parity:.1e}", verdict))
    return rows


def _sizes(sizes: ModelSizes, dtype: str) -> list[tuple[str, str, str, str]]:
    rows = []
    for label, change in (
        ("parameters of the families, as factors", sizes.family_parameters),
        ("parameters of the model, so counted", sizes.model_parameters),
        ("bytes of the families in files", sizes.family_bytes),
        ("bytes of the model in files", sizes.model_bytes),
    ):
        if change is not None:
            rows.append(_change(label, change))
    before, after = sizes.resident_original, sizes.resident
    held = Change(None if before is None else before.experts, after.experts - after.cache)
    rows.append(_change(f"bytes of experts in memory, {dtype}", held))
    if after.cache:
        rows.append((f"bytes of composed bases, {dtype}", "", f"{after.cache:,}", "with the experts above"))
    whole = Change(None if before is None else before.total, after.total)
    rows.append(_change(f"bytes of the model in memory, {dtype}", whole))
    return rows


def _tasks(result: Evaluation) -> list[tuple[str, str, str, str]]:
    rows = []
    for task, metrics in result.tasks.items():
        for metric, after in metrics.items():
            if "stderr" in metric:
                continue
            before = result.tasks_original.get(task, {}).get(metric)
            difference = "" if before is None else f"{after - before:+.4f}"
            rows.append(
                (f"{task} {metric}", "-" if before is None else f"{before:.4f}", f"{after:.4f}", difference)
            )
    return rows


def _change(label: str, change: Change) -> tuple[str, str, str, str]:
    before = "-" if change.before is None else f"{change.before:,}"
    return label, before, f"{change.after:,}", "" if change.ratio is None else f"{change.ratio:.1%} of it"


def _with_interval(figures: Perplexity | None) -> str:
    if figures is None:
        return "-"
    return f"{figures.perplexity:.4g}{_between(figures.perplexity_interval, '{:.4g}')}"


def _between(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f" ({form.format(interval.low)} to {form.format(interval.high)})"
