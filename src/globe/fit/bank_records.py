"""The records of a fitted bank: its artefact and its report."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from globe.am.records import FitResult
from globe.bank.file import BankArtefact, Member
from globe.checkpoint import Checkpoint
from globe.config.choices import WEIGHT_METHODS
from globe.config.schema import Config
from globe.fit.figures import expert_relfrob
from globe.fit.finalise import Finalised
from globe.fit.normalise import Joined
from globe.fit.plan import BankPlan
from globe.fit.provenance import bank_options, experts_of
from globe.numerics.figures import atom_usage, relfrob, support_sizes
from globe.runs.chart_data import BankCharts
from globe.runs.summary import BankReport


def artefact_of(
    config: Config,
    checkpoint: Checkpoint,
    bank: BankPlan,
    joined: Joined,
    lam: float,
    activation: str,
    done: Finalised,
    source: dict[str, Any],
    seed: int,
) -> BankArtefact:
    """Return the artefact of fitted and finalised factors; its figures are added by `report_of`."""
    low_rank = done.factors.left is not None
    bounds = zip(bank.members, pairwise(joined.starts), strict=True)
    return BankArtefact(
        members=tuple(
            Member(one.layer, one.family, start, stop, experts_of(config, checkpoint, one))
            for one, (start, stop) in bounds
        ),
        codes=done.factors.codes,
        adapters=done.factors.adapters,
        activation=activation,
        lam=lam,
        bank=None if low_rank else done.factors.bank,
        atoms_left=done.factors.left,
        atoms_right=done.factors.right,
        mean=done.mean,
        scale=done.scale,
        source=source,
        config=bank_options(config),
        seed=seed,
        packed=done.packed,
    )


def figures_of_bytes(config: Config, artefact: BankArtefact) -> dict[str, float | None]:
    """Return the bytes that an engine must hold of a bank, and bits for each weight of the experts.

    Where the weights themselves are rounded, the basis they are written in says nothing and is not counted.
    """
    held = artefact.nbytes
    if config.method in WEIGHT_METHODS:
        held -= sum(tensor.nbytes for tensor in (artefact.bank, artefact.codes) if tensor is not None)
    return {"bytes": held, "bits_per_weight": 8 * held / artefact.family_parameters}


def figures_of_members(artefact: BankArtefact, done: Finalised) -> dict[str, float | None]:
    """Return RelFrob of each member of a bank that has several."""
    if len(artefact.members) == 1:
        return {}
    rows = {
        f"relfrob_layer{one.layer:03d}_{one.family}": slice(one.start, one.stop) for one in artefact.members
    }
    return {name: relfrob(done.errors[part], done.norms[part]) for name, part in rows.items()}


def report_of(
    config: Config,
    artefact: BankArtefact,
    bank: BankPlan,
    result: FitResult,
    done: Finalised,
    attempt: int,
    figures: dict[str, float | None],
    charts: BankCharts,
) -> BankReport:
    """Return the figures of a bank as they stand in its artefact and in `summary.json`."""
    sizes, codes = bank.sizes, artefact.codes
    return BankReport(
        key=bank.key,
        n=sizes.n,
        p=sizes.p,
        d=sizes.d,
        m=sizes.m,
        r=sizes.r,
        target_support=sizes.target_support,
        parameters=artefact.family_parameters,
        kept_parameters=bank.kept_parameters,
        relfrob_start=result.relfrob_start,
        relfrob_fit=result.relfrob,
        relfrob=done.relfrob,
        export_dtype=str(codes.dtype).removeprefix("torch."),
        stop=result.stop.sentence,
        steps=result.steps,
        accepted=result.accepted,
        rejected=result.rejected,
        regularised_solves=result.regularised_solves,
        seed=artefact.seed,
        attempt=attempt,
        supports=tuple(support_sizes(codes).tolist()),
        atom_usage=tuple(atom_usage(codes).tolist()),
        expert_relfrob=expert_relfrob(done),
        metrics=figures,
        method=str(config.method),
        atom_rank=sizes.atom_rank,
        charts=charts,
    )
