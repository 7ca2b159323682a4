"""Figures of a trained model: perplexity, do its experts matter, how far are they from random matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import expert_modules


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, *, window: int, batch: int = 8) -> float:
    """exp of the mean negative log-likelihood over windows without overlap; the first token is given."""
    model.eval()
    usable = tokens[: len(tokens) // window * window].view(-1, window)
    total = 0.0
    for rows in usable.split(batch):
        logits = model(rows).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return float(torch.tensor(total / (usable.numel() - len(usable))).exp())


@contextmanager
def zeroed(model: nn.Module, layers: list[int]) -> Iterator[None]:
    """Within the block the routed experts of `layers` (counted among the layers that have some) give zero."""
    chosen = [expert_modules(model)[layer].down_proj for layer in layers]
    saved = [parameter.detach().clone() for parameter in chosen]
    with torch.no_grad():
        for parameter in chosen:
            parameter.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(chosen, saved, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def expert_load(model: nn.Module, tokens: Tensor, *, window: int, top_k: int, batch: int = 8) -> list[Tensor]:
    """Per layer, each expert's share of all routed (token, expert) pairs; sums to one.

    Over a whole text: within a few windows of one book an expert for another kind of text looks unused.
    """
    model.eval()
    counts: list[Tensor] = []
    for rows in tokens[: len(tokens) // window * window].view(-1, window).split(batch):
        logits = [one.flatten(0, -2) for one in model(rows, output_router_logits=True).router_logits]
        chosen = [one.topk(top_k, dim=-1).indices.flatten() for one in logits]
        now = [torch.bincount(who, minlength=one.shape[-1]) for who, one in zip(chosen, logits, strict=True)]
        counts = [old + new for old, new in zip(counts, now, strict=True)] if counts else now
    return [count / count.sum() for count in counts]


def relative_error(experts: Tensor, approximation: Tensor) -> float:
    return float((experts - approximation).norm() / experts.norm())


def spectrum_figures(experts: Tensor, *, rank: int) -> dict[str, float]:
    """Of experts (n, p, d): mean effective rank (95 % of the energy), and the relative Frobenius error of two
    closed forms: the truncated SVD of every expert at `rank`, and one basis of 2 * `rank` rows shared by all.
    Random matrices have no structure within an expert or between experts: both errors are near their top.
    """
    experts = experts.double()
    U, S, Vh = torch.linalg.svd(experts, full_matrices=False)
    energy = (S**2).cumsum(-1) / (S**2).sum(-1, keepdim=True)
    svd = (U[..., :rank] * S[..., None, :rank]) @ Vh[:, :rank]
    basis = torch.linalg.eigh(torch.einsum("npd,npe->de", experts, experts)).eigenvectors[:, -2 * rank :]
    return {
        "effective_rank": float(((energy < 0.95).sum(-1) + 1).double().mean()),
        "svd_error": relative_error(experts, svd),
        "shared_error": relative_error(experts, experts @ basis @ basis.T),
    }


def similarity(experts: Tensor, start: Tensor) -> Tensor:
    """Cosine between each expert (n, p, d) and its random start: 1 is untouched, 0 has forgotten it."""
    return F.cosine_similarity(experts.flatten(1), start.flatten(1))
