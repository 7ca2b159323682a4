"""How far the next-token distributions of a compressed model are from the original's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


def kl_divergence(original: Float[Tensor, "t v"], compressed: Float[Tensor, "t v"]) -> Float[Tensor, " t"]:
    """KL(P || Q) = sum_v P log(P / Q) of each token in nats, from logits, in float32.

    Summed as P log(P / Q) - P + Q, which changes nothing in the sum and makes every term positive, so that
    equal logits give exactly 0 and nearly equal ones no rounding below it. Entries with P = 0 (logits of
    minus infinity) contribute Q; infinite where Q = 0 and P is not.
    """
    log_p, log_q = (torch.log_softmax(logits.float(), dim=1) for logits in (original, compressed))
    p = log_p.exp()
    weighted = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return (weighted - p + log_q.exp()).clamp_min(0).sum(dim=1)


def top1_agreement(original: Float[Tensor, "t v"], compressed: Float[Tensor, "t v"]) -> Float[Tensor, " t"]:
    """1 where the likeliest next token is the same, else 0; the first of equally likely ones counts."""
    return (original.argmax(dim=1) == compressed.argmax(dim=1)).float()


def divergence(
    kl: Float[Tensor, " w"], agreement: Float[Tensor, " w"], tokens: Float[Tensor, " w"], *, seed: int
) -> Divergence:
    """From the sums of the windows (`globe.evaluation.perplexity.WindowSums`)."""
    return Divergence(
        kl=float(kl.sum() / tokens.sum()),
        kl_interval=ratio_interval(kl, tokens, seed=seed),
        top1_agreement=float(agreement.sum() / tokens.sum()),
        top1_agreement_interval=ratio_interval(agreement, tokens, seed=seed),
    )
