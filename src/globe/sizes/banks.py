"""The banks of a run with their sizes: as given, chosen within a share of each bank, or of all banks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from globe.calibration.run import Calibration
from globe.checkpoint import Checkpoint
from globe.config.choices import Over
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.fit.plan import BankPlan, Outline, is_search, plan_bank
from globe.runs.folder import RunFolder
from globe.sizes.chosen import choose_sizes
from globe.sizes.serving import require_served, serving_of
from globe.sizes.whole_budget import FILE, spread_budget


@dataclass(frozen=True, slots=True)
class Sizing:
    """What the sizes of a run's banks follow from."""

    checkpoint: Checkpoint
    device: torch.device
    folder: RunFolder
    """where searches and allocations are kept"""
    calibration: Calibration | None = None
    quiet: bool = False
    """print no table"""


def is_chosen(config: Config) -> bool:
    """Whether sizes are chosen by short fits or by a budget for all banks, and not by what is given alone."""
    return is_search(config) or config.budget.over is Over.model


def sized_banks(config: Config, banks: Sequence[Outline], sizing: Sizing) -> tuple[BankPlan, ...]:
    """The banks to learn, in the order they were given, without those that a budget for all leaves as they are.

    Raises ConfigError where a size or share is not possible, and what the searches raise.
    """
    shares: dict[str, float | None] = {bank.key: config.bank.kept for bank in banks}
    if config.bank.kept is not None and config.budget.over is Over.model:
        found = spread_budget(
            config,
            sizing.checkpoint,
            banks,
            sizing.device,
            sizing.folder.path / FILE,
            calibration=sizing.calibration,
            show=_nothing if sizing.quiet else None,
        )
        shares = {one.key: one.kept for one in found.shares}
        banks = [bank for bank in banks if shares[bank.key] != 1]
        if not banks:
            raise ConfigError(
                f"bank.kept={config.bank.kept} leaves all experts as they are: give a smaller share"
            )
    plans: dict[str, BankPlan] = {}
    for share in dict.fromkeys(shares[bank.key] for bank in banks):
        alike = [bank for bank in banks if shares[bank.key] == share]
        plans |= {one.key: one for one in _of_one_share(config, alike, share, sizing)}
    return tuple(plans[bank.key] for bank in banks)


def _of_one_share(
    config: Config, banks: Sequence[Outline], share: float | None, sizing: Sizing
) -> list[BankPlan]:
    file = sizing.folder.frontier_file
    if share != config.bank.kept:
        config = replace(config, bank=replace(config.bank, kept=share))
        file = file.with_name(f"frontier-{share:.4f}.json")
    if not is_search(config):
        plans = [plan_bank(config, bank) for bank in banks]
        for plan in plans:
            require_served(serving_of(config, sizing.checkpoint, plan.outline), plan.sizes)
        return plans
    show = _nothing if sizing.quiet else None
    chosen = choose_sizes(
        config,
        sizing.checkpoint,
        banks,
        sizing.device,
        file,
        show=show,
        calibration=sizing.calibration,
    )
    return [plan_bank(config, bank, chosen[bank.shape]) for bank in banks]


def _nothing(found: object) -> None:
    """Nobody looks."""
