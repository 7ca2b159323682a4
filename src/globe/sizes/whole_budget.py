"""`budget.over=model`: one share for all banks of a run together, spread over layers and families before any fit.

Every (layer, family) gets a curve of losses over sizes: the closed-form error of a shared basis (`globe.sizes.curves`),
times the share of it that short fits leave (`globe.sizes.gain`), scaled to the divergence of the model with that one
compressed (`globe.calibration.sensitivity`) where there is a calibration text. `globe.sizes.allocation` then chooses
exactly. What is best left as it is gets no bank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from globe.calibration.sensitivity import sensitivities
from globe.checkpoint import Checkpoint
from globe.checkpoint.in_memory import ExpertsInMemory
from globe.config.console import add_row, new_table, say, show_table, wide_console
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.fit.plan import Outline
from globe.fit.provenance import bank_options, stamp
from globe.runs.allocation import Allocation, Share, read_allocation, write_allocation
from globe.sizes.allocation import Curve, allocate
from globe.sizes.curves import Spectrum, approximated, limits, spectrum
from globe.sizes.gain import Gain, measure_gain
from globe.sizes.sizing import Sizing

_BAR = 20
"""Characters of a share of 1 in the table."""


def spread_budget(config: Config, banks: Sequence[Outline], sizing: Sizing, file: Path) -> Allocation:
    """Choose the share of every bank, print and show it, or read what `file` holds if it is of the same run.

    Raises ConfigError where the share is too small for the smallest
    banks, CheckpointError when experts can't be read, and what `sensitivities` raises.
    """
    key = _fingerprint(config, sizing.checkpoint, banks)
    found = read_allocation(file, fingerprint=key)
    if found is None:
        found = _spread(config, banks, sizing)
        write_allocation(found, file, fingerprint=key)
        if not sizing.quiet:
            print_allocation(found)
        sizing.on_allocation(found)
    return found


def _spread(config: Config, banks: Sequence[Outline], sizing: Sizing) -> Allocation:
    kept = config.bank.kept
    assert kept is not None
    spectra: dict[str, Spectrum] = {}
    gains: dict[str, Gain] = {}
    for bank in banks:
        joined, metric = sizing.read(config, bank)
        spectra[bank.key] = spectrum(joined.experts, metric)
        gains[bank.key] = measure_gain(joined.experts, metric, config)
        del joined, metric
    felt = _measure(config, banks, sizing, spectra)
    numbers = [bank.n * bank.p * bank.d for bank in banks]
    curves = [
        _curve(config, spectra[bank.key], gains[bank.key], count, felt.get(bank.key))
        for bank, count in zip(banks, numbers, strict=True)
    ]
    equal = [curve.sizes.index(int(kept * count)) for curve, count in zip(curves, numbers, strict=True)]
    chosen = allocate(curves, int(kept * sum(numbers)), known=equal)
    assert chosen is not None, "equal shares fit"
    shares = [
        Share(
            bank.key,
            count,
            curve.sizes[at] / count,
            felt.get(bank.key, 1.0),
            curve.losses[at],
            curve.losses[same],
        )
        for bank, count, curve, at, same in zip(banks, numbers, curves, chosen, equal, strict=True)
    ]
    return Allocation(kept, bool(felt), tuple(shares))


def _curve(config: Config, basis: Spectrum, gain: Gain, parameters: int, felt: float | None) -> Curve:
    """Return the losses over sizes of one bank; `felt` is its measured divergence at the run's share, None without."""
    kept = config.bank.kept
    assert kept is not None
    equal = int(kept * parameters)
    if basis.rows(equal) < 1:
        raise ConfigError(f"bank.kept={kept} leaves no room for one row of one atom: give a larger share")
    options = [one for one in limits(parameters, kept) if basis.rows(one) > 0]
    error = basis.error(equal)
    weight = felt / error if felt is not None and error > 0 else 1.0
    losses = [
        0.0 if one == parameters else weight * basis.error(one) * gain.at(one / parameters) for one in options
    ]
    return Curve(tuple(options), tuple(losses))


def _measure(
    config: Config, banks: Sequence[Outline], sizing: Sizing, spectra: dict[str, Spectrum]
) -> dict[str, float]:
    """Return the nats per token of the model with one bank alone at the run's share, by key; nothing without a text."""
    if config.calibrate.text is None:
        return {}
    if isinstance(sizing.checkpoint, ExpertsInMemory):
        raise ConfigError(
            "calibrate.text with budget.over=model runs the model, which needs its folder or hub id: give that, or "
            "leave out calibrate.text"
        )
    of = {(bank.members[0].layer, bank.members[0].family): bank for bank in banks}
    kept = config.bank.kept
    assert kept is not None

    def candidate(layer: int, family: str) -> list[Float[Tensor, "n p d"]]:
        bank = of[layer, family]
        joined, metric = sizing.read(config, bank)
        limit = int(kept * bank.n * bank.p * bank.d)
        return [approximated(joined, metric, spectra[bank.key], limit)]

    found = sensitivities(sizing.checkpoint, config.calibrate, candidate, sorted(of), device=sizing.device)
    return {of[one.layer, one.family].key: one.kl for one in found}


def _fingerprint(config: Config, checkpoint: Checkpoint, banks: Sequence[Outline]) -> str:
    calibrate = {
        "text": config.calibrate.text,
        "tokens": config.calibrate.tokens,
        "gradient_tokens": config.calibrate.gradient_tokens,
        "window": config.calibrate.window,
    }
    what = [bank_options(config), calibrate, checkpoint.source(), stamp(config.model.path)]
    text = json.dumps([*what, [bank.key for bank in banks]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def print_allocation(found: Allocation, console: Console | None = None) -> None:
    """Print the table of shares with a bar for each, and what is gained over equal shares."""
    console = wide_console(console)
    show_table(console, allocation_table(found))
    least, uniform = (sum(getattr(one, name) for one in found.shares) for name in ("loss", "uniform_loss"))
    unit = (
        "nats per token"
        if found.measured
        else "of the energies, since no calibrate.text says what the model feels"
    )
    say(
        console,
        f"{found.used:.1%} of all numbers kept; predicted loss {least:.4g} instead of {uniform:.4g} with equal shares, "
        f"{unit}",
    )


def allocation_table(found: Allocation) -> Table:
    """Return a row for each bank: its sensitivity, its share as a number and as a bar, and its losses."""
    what = "divergence" if found.measured else "weight"
    title = f"one budget of {found.kept:.1%} over {len(found.shares)} banks"
    headings = ("bank", f"{what}\nby itself", "kept", "0 to 1", "loss", "with equal\nshares")
    table = new_table(title, headings, left=("0 to 1",))
    for one in found.shares:
        bar = "#" * round(_BAR * one.kept)
        kept = "all" if one.kept == 1 else f"{one.kept:.1%}"
        add_row(
            table,
            [
                one.key,
                f"{one.sensitivity:.3g}",
                kept,
                f"{bar:.<{_BAR}}",
                f"{one.loss:.3g}",
                f"{one.uniform_loss:.3g}",
            ],
        )
    return table
