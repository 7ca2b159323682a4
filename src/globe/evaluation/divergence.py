"""How far the next-token distributions of a compressed model are from the original's."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from globe.evaluation.bootstrap import Interval, ratio_interval


@dataclass(frozen=True, slots=True)
class Divergence:
    """Means over the tokens of a text; intervals are at 95 %, None where there are too few windows."""

    kl: float
    """KL(original || model), nats"""
    kl_interval: Interval | None
    top1_agreement: float
    """share of the tokens where both think the same next token the likeliest"""
    top1_agreement_interval: Interval | None


def divergence(
    kl: Float[Tensor, " w"], agreement: Float[Tensor, " w"], tokens: Float[Tensor, " w"], *, seed: int
) -> Divergence:
    """Return the means from the sums of the windows (`globe.evaluation.perplexity.WindowSums`)."""
    return Divergence(
        kl=float(kl.sum() / tokens.sum()),
        kl_interval=ratio_interval(kl, tokens, seed=seed),
        top1_agreement=float(agreement.sum() / tokens.sum()),
        top1_agreement_interval=ratio_interval(agreement, tokens, seed=seed),
    )
