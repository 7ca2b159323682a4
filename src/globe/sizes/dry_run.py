"""`dry_run=true`: sizes, kept shares, memory, time and file sizes of a run, predicted without a fit.

Memory is counted (`globe.sizes.costs`), time is measured on a few random experts (`globe.sizes.timing`), about a second
for small banks. What is predicted is a GloBE fit by Gauss-Newton steps; the other methods show their sizes, what they
keep and their files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from globe.am.records import Sizes
from globe.checkpoint import Checkpoint, open_checkpoint
from globe.config.choices import Method, Metric, Over, Store
from globe.config.console import add_row, new_table, say, show_table, wide_console
from globe.config.schema import Config, chosen_metric
from globe.fit.calibrated import calibration_for
from globe.fit.plan import BankPlan, BankSize, Outline, is_search, outline, plan_bank
from globe.fit.reading import DTYPES
from globe.numerics.device import arithmetic, limit_threads, peak_host_bytes
from globe.runs.allocation import FILE
from globe.sizes.byte_search import byte_candidates
from globe.sizes.byte_spread import spread_bytes
from globe.sizes.chosen import allows, byte_room_of, given_bytes, limits_of, room_of
from globe.sizes.costs import fit_bytes, in_metric
from globe.sizes.file_sizes import file_bytes, saved_bytes
from globe.sizes.model_size import with_model_size
from globe.sizes.search import plan_search
from globe.sizes.serving import Cost, costs_of, require_served, serving_of, serving_table, size_of
from globe.sizes.sizing import Sizing
from globe.sizes.timing import is_curved, seconds_of_steps
from globe.sizes.whole_budget import spread_budget

_LATER = 40 * 2**20
"""Bytes of what a fit loads only when it needs it, scipy's solvers above all."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row of the table: a bank, or with `bank.kept` a candidate for the sizes of all banks of one shape."""

    bank: BankPlan
    count: int
    """banks that the row stands for"""
    file_bytes: int
    """of one bank's artefact"""
    bytes: int | None = None
    """peak, of the process on a CPU and of the device on another; None where it is not predicted"""
    seconds: float | None = None
    """per step"""
    share: float | None = None
    """what the bank may keep, where sizes follow from it"""
    serving: Mapping[str, Cost] = field(default_factory=dict)
    """what each form costs to serve (`globe.sizes.serving`); empty for a baseline"""

    def seconds_at_most(self, config: Config) -> float | None:
        """Return the seconds of the fit of one bank, if it takes all its steps."""
        if self.seconds is None:
            return None
        return min(self.seconds * config.train.steps, config.train.time_limit or float("inf"))


@dataclass(frozen=True, slots=True)
class Totals:
    """The whole run, each figure at least and at most over the candidates for its sizes."""

    banks: int
    seconds: tuple[float, float] | None
    """of the fits one after the other, and the search for sizes"""
    bytes: int | None
    """peak of the largest"""
    file_bytes: tuple[int, int]
    """of all artefacts"""
    model_bytes: int
    """of the checkpoint as it is"""
    dense_bytes: int
    """of a dense checkpoint; more than `model_bytes` where that is quantised"""
    patched_bytes: tuple[int, int]
    """of a checkpoint with factors, `globe.patch format=globe`"""
    dense_only: str | None = None
    """why there is none, if there is none"""


def predict(
    config: Config, checkpoint: Checkpoint, device: torch.device, shares: Mapping[str, float] | None = None
) -> tuple[Prediction, ...]:
    """Predict every bank of a run. With `bank.kept` the sizes are still to be chosen: the candidates of each shape.

    `shares` are those of a budget for all banks, by key; a bank with a share of 1 is none.
    """
    banks = outline(config, checkpoint)
    whole = config.bank.kept if config.bank.size is None else config.bank.size
    kept = {bank.key: whole for bank in banks} if shares is None else dict(shares)
    rows = _rows(config, checkpoint, [bank for bank in banks if shares is None or kept[bank.key] != 1], kept)
    seconds: dict[Sizes, float] = {}
    base = 0
    if config.method is Method.globe:
        base = _resident_bytes() + _LATER if device.type == "cpu" else 0
        seconds |= seconds_of_steps(config, [bank.sizes for bank, _ in rows], device)
    return tuple(
        Prediction(
            bank,
            count,
            file_bytes(config, checkpoint, bank),
            base + bytes_of(config, checkpoint, bank) if bank.sizes in seconds else None,
            seconds.get(bank.sizes),
            kept[bank.key],
            costs_of(config, checkpoint, bank.outline, size_of(bank.sizes)) if bank.sizes in seconds else {},
        )
        for bank, count in rows
    )


def _rows(
    config: Config, checkpoint: Checkpoint, banks: Sequence[Outline], kept: Mapping[str, float | None]
) -> list[tuple[BankPlan, int]]:
    """Return every bank once, or where sizes are chosen every candidate of a shape and share, with its bank count."""
    found = []
    for shape, share in dict.fromkeys((one.shape, kept[one.key]) for one in banks):
        alike = [one for one in banks if (one.shape, kept[one.key]) == (shape, share)]
        size, part = (None, share) if config.bank.size is None else (share, None)
        own = replace(config, bank=replace(config.bank, size=size, kept=part))
        if config.bank.size is not None and is_search(config):
            sizes = byte_sizes(own, alike[0])
            found += [(plan_bank(own, alike[0], size), len(alike)) for size in sizes]
        elif is_search(config):
            found += [(bank, len(alike)) for bank in candidate_plans(own, alike[0], checkpoint)]
        else:
            plans = [plan_bank(own, one) for one in alike]
            for plan in plans:
                require_served(serving_of(own, checkpoint, plan.outline), plan.sizes)
            found += [(plan, 1) for plan in plans]
    order = {bank.key: at for at, bank in enumerate(banks)}
    return sorted(found, key=lambda row: order[row[0].key])


def byte_sizes(config: Config, bank: Outline) -> list[BankSize]:
    """Return the sizes that `bank.size` may choose for a bank: one where m and r are given."""
    if config.bank.m is not None:
        return [given_bytes(config, bank)]
    return byte_candidates(byte_room_of(config, bank))


def candidate_plans(config: Config, bank: Outline, checkpoint: Checkpoint | None = None) -> list[BankPlan]:
    """Return the sizes that the search begins with.

    `checkpoint` is asked what serving costs, where `serve` has limits.
    """
    room = room_of(config, bank)
    serving = None if checkpoint is None else limits_of(config, checkpoint, bank, room)
    search = plan_search(room, config, lambda m: allows(config, m), serving)
    return [plan_bank(config, bank, size) for size in search.first]


def totals(config: Config, checkpoint: Checkpoint, found: Sequence[Prediction]) -> Totals:
    """Add up the banks: of every shape the least and the most that its candidates take."""
    groups: dict[object, list[Prediction]] = {}
    for one in found:
        key = (one.bank.outline.shape, one.share) if is_search(config) else one.bank.key
        groups.setdefault(key, []).append(one)
    alike = list(groups.values())
    sizes = [_span([one.count * one.file_bytes for one in rows]) for rows in alike]
    saved = [_span([one.count * saved_bytes(config, checkpoint, one.bank) for one in rows]) for rows in alike]
    plain = checkpoint.plain_bytes
    seconds = None
    if all(one.seconds is not None for one in found):
        times = [_span([one.count * (one.seconds_at_most(config) or 0.0) for one in rows]) for rows in alike]
        searching = (
            config.budget.seconds * len(alike) if config.bank.kept is not None and is_search(config) else 0.0
        )
        seconds = sum(least for least, _ in times) + searching, sum(most for _, most in times) + searching
    return Totals(
        banks=sum(rows[0].count for rows in alike),
        seconds=seconds,
        bytes=max((one.bytes for one in found if one.bytes is not None), default=None),
        file_bytes=(int(sum(least for least, _ in sizes)), int(sum(most for _, most in sizes))),
        model_bytes=checkpoint.stored_bytes,
        dense_bytes=plain,
        patched_bytes=(
            int(plain - sum(most for _, most in saved)),
            int(plain - sum(least for least, _ in saved)),
        ),
        dense_only=checkpoint.dense_only,
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _resident_bytes() -> int:
    """Return the present memory of the process; its peak so far is more where the system counts that of its parent."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_host_bytes() or 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def metric_numbers(config: Config, bank: BankPlan) -> int:
    """Count the numbers of a metric's roots and row weights: one root of an expert, for up and gate alike."""
    n, p, d = bank.outline.shape
    match chosen_metric(config):
        case Metric.experts:
            return 2 * d * d
        case Metric.inputs:
            counts = zip(bank.members, bank.outline.counts, strict=True)
            of_layers = {member.layer: count for member, count in counts if member.family != "down"}
            down = any(member.family == "down" for member in bank.members)
            return sum(of_layers.values()) * d * d + n * p * (p if down else 1)
        case _:
            return 0


def bytes_of(config: Config, checkpoint: Checkpoint, bank: BankPlan) -> int:
    """Return the bytes that a fit of the bank holds at most, beside the program."""
    return fit_bytes(
        bank.sizes,
        itemsize=DTYPES[config.dtype].itemsize,
        source_itemsize=checkpoint.dtype(*bank.members[0]).itemsize,
        curved=is_curved(config),
        joint=config.codes.joint,
        members=len(bank.members),
        stored=config.normalise.store is Store.checkpoint,
        metric=metric_numbers(config, bank),
        projected=in_metric(config),
    )


def dry_run(config: Config, console: Console | None = None) -> tuple[Prediction, ...]:
    """Open the checkpoint, predict, print the table and the totals. Raises ConfigError or CheckpointError as a run."""
    console = wide_console(console)
    with arithmetic(config) as device:
        checkpoint = open_checkpoint(
            config.model.path, revision=config.model.revision, force_download=config.model.force_download
        )
        limit_threads(config, max(bank.n * bank.p * bank.d for bank in outline(config, checkpoint)))
        banks = outline(config, checkpoint)
        config, shares = with_model_size(config, checkpoint, banks), None
        if config.budget.over is Over.model and config.bank.size is not None:
            sizing = Sizing(checkpoint, device, calibration_for(config, checkpoint, banks, device))
            shares = spread_bytes(config, banks, sizing)
        elif config.budget.over is Over.model:
            with tempfile.TemporaryDirectory(prefix="globe-") as scratch:
                sizing = Sizing(checkpoint, device, calibration_for(config, checkpoint, banks, device))
                spread = spread_budget(config, banks, sizing, Path(scratch) / FILE)
            shares = {one.key: one.kept for one in spread.shares}
        found = predict(config, checkpoint, device, shares)
    show_table(console, _table(config, found, str(device)))
    if any(one.serving for one in found):
        show_table(console, serving_table({one.bank.sizes: one.serving for one in found}, config.serve.batch))
    for line in sentences(config, totals(config, checkpoint, found)):
        say(console, line)
    return found


def sentences(config: Config, whole: Totals) -> list[str]:
    """Say what the run takes in all."""
    plural = "s" * (whole.banks != 1)
    lines = []
    if is_search(config) and (config.bank.size is None or config.bank.m is None):
        lines.append(
            f"bank.kept={config.bank.kept} chooses among these, and what lies halfway between them, by short fits that "
            f"take about {config.budget.seconds:g} s (budget.seconds) for each shape"
            if config.bank.size is None
            else f"bank.size={config.bank.size:.6g} chooses among these by short fits, and its bits with them"
        )
    if whole.seconds is not None:
        least, most = (_duration(one) for one in whole.seconds)
        time = least if least == most else f"{least} to {most}"
        memory = "" if whole.bytes is None else f", in {_size(whole.bytes)} of memory"
        lines.append(f"{whole.banks} bank{plural}: {time} at most, one after the other{memory}")
    quantised = whole.dense_bytes != whole.model_bytes
    ways = [] if whole.dense_only else [f"become {_sizes(whole.patched_bytes)} with globe.patch format=globe"]
    ways.append(
        f"become {_size(whole.dense_bytes)}, dequantised, with format=dense"
        if quantised
        else "stay with format=dense"
    )
    lines.append(
        f"files: {_sizes(whole.file_bytes)} for the bank{plural}; the model's {_size(whole.model_bytes)} "
        f"{', and '.join(ways)}"
    )
    if whole.dense_only:
        lines.append(whole.dense_only)
    return lines


def _sizes(span: tuple[int, int]) -> str:
    least, most = (_size(one) for one in span)
    return least if least == most else f"{least} to {most}"


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{max(1, seconds):.0f} s"


def _table(config: Config, found: Sequence[Prediction], device: str) -> Table:
    figures = ("kept of\nfamily", "peak\nmemory", "seconds\nper step", "seconds\nat most", "file")
    title = f"dry run of {config.method} on {device}: nothing is fitted"
    table = new_table(title, ("bank", "n x p x d", "m", "r", "k", *figures))
    for one in found:
        sizes, longest = one.bank.sizes, one.seconds_at_most(config)
        cells = (
            one.bank.key if one.count == 1 else f"{one.count} banks",
            f"{sizes.n} x {sizes.p} x {sizes.d}",
            str(sizes.m),
            str(sizes.r),
            "-" if sizes.atom_rank is None else str(sizes.atom_rank),
            f"{one.bank.kept:.1%}",
            "-" if one.bytes is None else f"{one.bytes / 2**20:,.0f} MiB",
            "-" if one.seconds is None else f"{one.seconds:.3g}",
            "-" if longest is None else f"{longest:,.0f}" if longest >= 10 else f"{longest:.2g}",
            _size(one.file_bytes),
        )
        add_row(table, cells)
    return table
