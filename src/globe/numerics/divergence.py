"""How far one next-token distribution is from another, token by token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def kl_divergence(original: Float[Tensor, "t v"], compressed: Float[Tensor, "t v"]) -> Float[Tensor, " t"]:
    """Return KL(P || Q) = sum_v P log(P / Q) of each token in nats, from logits, in float32.

    Summed as P (exp(z) - 1 - z) with z = log(Q / P), which changes nothing in the sum as P and Q add up to 1,
    and makes every term positive: equal logits give exactly 0, and nearly equal ones keep their digits, where
    the plain sum cancels. Entries with P = 0 (logits of minus infinity) contribute Q; infinite where Q = 0
    and P is not.
    """
    log_p, log_q = (torch.log_softmax(logits.float(), dim=1) for logits in (original, compressed))
    p, q = log_p.exp(), log_q.exp()
    z = torch.where(p > 0, log_q - log_p, 0.0)
    # exp(z) could overflow where Q is much above P, and nothing cancels there
    terms = torch.where(z > 1, q - p - p * z, p * (torch.expm1(z.clamp(max=1)) - z))
    return torch.where(p > 0, terms, q).sum(dim=1)


def top1_agreement(original: Float[Tensor, "t v"], compressed: Float[Tensor, "t v"]) -> Float[Tensor, " t"]:
    """Return 1 where the likeliest next token is the same, else 0; the first of equally likely ones counts."""
    return (original.argmax(dim=1) == compressed.argmax(dim=1)).float()
