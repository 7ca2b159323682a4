"""The state a fit begins with: seeded atoms, first codes, and the size of the first mixed bases."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.objective import mix
from globe.am.options import Start
from globe.am.records import Sizes
from globe.am.seeding import first_codes, seed_bank
from globe.am.state import Atoms, low_rank_atoms
from globe.am.warm_start import WarmStart, truncated_svd
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.metric import Metric, root_of, times_inverse


def first_atoms(
    X: Float[Tensor, "n p d"],
    sizes: Sizes,
    init: Start,
    *,
    generator: torch.Generator,
    warm: WarmStart | None,
    metric: Metric | None = None,
    group: ProcessGroup = ALONE,
) -> Atoms:
    """Return a seeded bank and first codes, with mixed bases whose entries have the deviation `init.scale`.

    Low-rank atoms are their seeds projected to k random directions of the r rows, B_j = Q_j Q_j^T S_j. One projection
    on both sides keeps the seeds' common gauge: with two, atoms of aligned seeds cancel in mixtures, and fits end 1 %
    higher.

    In a metric, X_i L_i are given; atoms and codes are made for the experts as the mean metric sees them, all in one,
    and the atoms brought back from there.
    """
    if metric is not None:
        X = metric.in_mean(X)
        warm = None if warm is None else truncated_svd(X, sizes.r)
    bank, groups = seed_bank(
        X, sizes.m, sizes.r, seeding=init.seeding, generator=generator, warm_start=warm, group=group
    )
    bank = group.same(bank)
    # drawn for all experts, whoever holds them; fitted expert by expert
    drawn = init.codes == "mixed"
    codes = first_codes(
        init.codes,
        bank,
        groups if drawn else group.own(groups),
        generator=generator,
        one_hot=init.one_hot,
        concentration=init.concentration,
        bases=None if warm is None else warm.bases,
    )
    codes = group.own(codes) if drawn else codes
    if metric is not None:
        bank = group.same(times_inverse(bank, root_of(metric.mean)))
    if sizes.atom_rank is None:
        return Atoms(bank * (init.scale / spread(codes, bank, group)), codes)
    shape = (sizes.m, sizes.r, sizes.atom_rank)
    left = group.same(torch.linalg.qr(torch.randn(shape, generator=generator).to(bank)).Q)
    right = group.same(left.mT @ bank)
    size = init.scale / spread(codes, left @ right, group)
    balance = torch.linalg.vector_norm(left) / torch.linalg.vector_norm(right)
    return low_rank_atoms(left * (size / balance) ** 0.5, right * (size * balance) ** 0.5, codes)


def spread(codes: Float[Tensor, "n m"], bank: Float[Tensor, "m r d"], group: ProcessGroup = ALONE) -> float:
    """Return the root mean square of the entries of the mixed bases."""
    rows = [float(mix(one[None], bank).square().mean()) for one in codes]
    return (group.total(sum(rows)) / group.count(len(rows))) ** 0.5
