"""How well a model predicts a text, window by window; the model's logits of one batch are in memory.

Symbols: t tokens, v entries of the vocabulary, w windows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from globe.calibration.text import Tokens
from globe.errors import CheckpointError
from globe.evaluation.bootstrap import Interval, ratio_interval
from globe.evaluation.text import Window, batches
from globe.numerics.divergence import kl_divergence, top1_agreement
from globe.numerics.precision import to_float64

AT_ONCE = 1 << 22
"""Logits that are widened to float32 at once."""


@dataclass(frozen=True, slots=True, eq=False)
class WindowSums:
    """Sums over the counted tokens of each window. The last three are there if an original was given."""

    tokens: Float[Tensor, " w"]
    bytes: Float[Tensor, " w"]
    nll: Float[Tensor, " w"]
    """negative log-likelihood, nats"""
    nll_original: Float[Tensor, " w"] | None = None
    kl: Float[Tensor, " w"] | None = None
    """KL(original || model) of the next token, nats"""
    agreement: Float[Tensor, " w"] | None = None
    """tokens where both think the same next token the likeliest"""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of one model on one text; intervals are at 95 %, None where there are too few windows for them."""

    nll: float
    """mean negative log-likelihood of a token, nats"""
    perplexity: float
    """exp(nll), per token"""
    perplexity_interval: Interval | None
    byte_perplexity: float
    """exp(nats per UTF-8 byte)"""
    bits_per_byte: float
    bits_per_byte_interval: Interval | None


def negative_log_likelihood(logits: Float[Tensor, "t v"], targets: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Return -log softmax(logits)[target] of each token in nats, in float32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


@torch.no_grad()
def score(
    model: Any,
    tokens: Tokens,
    windows: Sequence[Window],
    *,
    original: Any | None = None,
    batch: int = 8,
    device: torch.device | None = None,
    on_batch: Callable[[int], None] = lambda windows: None,
    remembered: Callable[[Sequence[Window], Callable[[], Tensor]], Tensor] = lambda group, compute: compute(),
) -> WindowSums:
    """Run the windows through the model, and through the original beside it; both are on `device`.

    `on_batch` gets the number of windows of every batch done. `remembered` may keep the original's logits of a group
    of windows for the next model, instead of computing them. Raises CheckpointError when logits are not finite.
    """
    device = device or torch.device("cpu")
    sums: list[list[float]] = []
    for group in batches(windows, batch):
        logits = [window_logits(model, tokens, group, device)]
        if original is not None:
            logits.append(remembered(group, partial(window_logits, original, tokens, group, device)))
        for row, window in enumerate(group):
            targets = tokens.ids[window.stop - window.scored : window.stop].to(device)
            sums.append(_sums([one[row, -window.scored :] for one in logits], targets))
        on_batch(len(group))
    table = torch.tensor(sums, dtype=torch.float64)
    if not bool(torch.isfinite(table).all()):
        raise CheckpointError(
            "the model gives logits that are not finite: evaluate with dtype=float32 or bfloat16, or mend it"
        )
    places = [slice(window.stop - window.scored, window.stop) for window in windows]
    lengths = torch.tensor([window.scored for window in windows], dtype=torch.float64)
    sizes = torch.stack([tokens.bytes[place].sum() for place in places]).double()
    return WindowSums(lengths, sizes, *table.unbind(dim=1))


def window_logits(
    model: Any, tokens: Tokens, group: Sequence[Window], device: torch.device
) -> Float[Tensor, "b k v"]:
    """Return the logits that predict the last k tokens of windows of one length, k the most that one of them counts."""
    ids = torch.stack([tokens.ids[window.start : window.stop] for window in group]).to(device)
    keep = max(window.scored for window in group) + 1
    # the output layer is the largest product of a small model: it need not see the tokens of the context
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(ids, use_cache=False, **({"logits_to_keep": keep} if few else {})).logits
    return logits[:, -keep:-1]


def _sums(logits: Sequence[Float[Tensor, "t v"]], targets: Int[Tensor, " t"]) -> list[float]:
    """Return one row of `WindowSums`, from the logits of the model, or of the model and the original."""
    rows = max(1, AT_ONCE // logits[0].shape[1])
    totals = torch.zeros(1 if len(logits) == 1 else 4, dtype=torch.float64)
    for first in range(0, targets.shape[0], rows):
        part = slice(first, first + rows)
        own = logits[0][part]
        figures = [negative_log_likelihood(own, targets[part])]
        if len(logits) == 2:
            other = logits[1][part]
            figures.append(negative_log_likelihood(other, targets[part]))
            figures.append(kl_divergence(other, own))
            figures.append(top1_agreement(other, own))
        totals += torch.stack([to_float64(figure).sum().cpu() for figure in figures])
    return totals.tolist()


def perplexity(nll: Float[Tensor, " w"], sums: WindowSums, *, seed: int) -> Perplexity:
    """Return the perplexity from the sums of the windows; `nll` are those of the model or of the original."""
    mean = float(nll.sum() / sums.tokens.sum())
    per_byte = float(nll.sum() / sums.bytes.sum())
    around = ratio_interval(nll, sums.tokens, seed=seed)
    bits = ratio_interval(nll / math.log(2), sums.bytes, seed=seed)
    return Perplexity(
        nll=mean,
        perplexity=_exp(mean),
        perplexity_interval=_exp_both(around),
        byte_perplexity=_exp(per_byte),
        bits_per_byte=per_byte / math.log(2),
        bits_per_byte_interval=bits,
    )


@dataclass(frozen=True, slots=True)
class Rise:
    """A model's perplexity against the original's, window by window on the same text."""

    perplexity: float
    """the model's minus the original's"""
    ratio: float
    """the model's over the original's"""
    ratio_interval: Interval | None
    """much narrower than the intervals of the two: what makes a text hard makes it hard for both"""


def rise(sums: WindowSums, *, seed: int) -> Rise:
    """Return the rise from the sums of the windows, which must have been taken beside an original."""
    assert sums.nll_original is not None
    before, after = (float(nll.sum() / sums.tokens.sum()) for nll in (sums.nll_original, sums.nll))
    paired = ratio_interval(sums.nll - sums.nll_original, sums.tokens, seed=seed)
    return Rise(_exp(after) - _exp(before), _exp(after - before), _exp_both(paired))


def _exp(nats: float) -> float:
    """Return exp, or infinity where a float can't hold it: a broken model is a result as well."""
    return math.exp(nats) if nats < 700 else math.inf


def _exp_both(interval: Interval | None) -> Interval | None:
    return None if interval is None else Interval(_exp(interval.low), _exp(interval.high))
