"""The banks of a run with their sizes: as given, chosen within a share of each bank, or of all banks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from globe.config.choices import Over
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.fit.plan import BankPlan, BankSize, Outline, is_search, plan_bank
from globe.runs.allocation import FILE
from globe.runs.folder import RunFolder
from globe.sizes.budget import resized
from globe.sizes.byte_spread import spread_bytes
from globe.sizes.chosen import allows, choose_sizes, room_of
from globe.sizes.serving import require_served, serving_of
from globe.sizes.sizing import Sizing
from globe.sizes.whole_budget import spread_budget


def is_chosen(config: Config) -> bool:
    """Return whether sizes are chosen by short fits or by a budget for all banks, and not by what is given alone."""
    return is_search(config) or config.budget.over is Over.model


def sized_banks(
    config: Config, banks: Sequence[Outline], sizing: Sizing, folder: RunFolder
) -> tuple[BankPlan, ...]:
    """Return the banks to learn, in the order they were given, without those that a budget for all leaves as they are.

    Searches and allocations are kept in `folder`. Raises ConfigError where a size or share is not possible, and what
    the searches raise.
    """
    whole = config.bank.kept if config.bank.size is None else config.bank.size
    shares: dict[str, float | None] = {bank.key: whole for bank in banks}
    if config.bank.size is not None and config.budget.over is Over.model:
        shares = dict(spread_bytes(config, banks, sizing))
    if config.bank.kept is not None and config.budget.over is Over.model:
        found = spread_budget(config, banks, sizing, folder.path / FILE)
        shares = {one.key: one.kept for one in found.shares}
        banks = [bank for bank in banks if shares[bank.key] != 1]
        if not banks:
            raise ConfigError(
                f"bank.kept={config.bank.kept} leaves all experts as they are: give a smaller share"
            )
    plans: dict[str, BankPlan] = {}
    if config.bank.kept is not None and is_search(config):
        forms = choose_sizes(config, banks, sizing, folder.frontier_file)
        for bank in banks:
            plans[bank.key] = _of_form(config, bank, forms[bank.shape], shares[bank.key])
        return tuple(plans[bank.key] for bank in banks)
    for share in dict.fromkeys(shares[bank.key] for bank in banks):
        alike = [bank for bank in banks if shares[bank.key] == share]
        size, kept = (None, share) if config.bank.size is None else (share, None)
        own = replace(config, bank=replace(config.bank, size=size, kept=kept))
        chosen = choose_sizes(own, alike, sizing, folder.frontier_file) if is_search(own) else {}
        for bank in alike:
            plans[bank.key] = plan_bank(own, bank, chosen.get(bank.shape))
            if not chosen:
                require_served(serving_of(own, sizing.checkpoint, bank), plans[bank.key].sizes)
    return tuple(plans[bank.key] for bank in banks)


def _of_form(config: Config, bank: Outline, form: BankSize, share: float | None) -> BankPlan:
    """Plan a bank of the atoms that a search within the run's own share chose, with the rows that its share allows.

    A search for every share would cost more than the fits.
    """
    if share == config.bank.kept:
        return plan_bank(config, bank, form)
    own = replace(config, bank=replace(config.bank, kept=share))
    room = room_of(own, bank)
    return plan_bank(own, bank, resized(room, form, room, allows=partial(allows, own)))
