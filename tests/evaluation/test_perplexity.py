"""Perplexity and divergence of whole models, against loops that do one token at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import globe.evaluation.perplexity as module
from globe.calibration.text import Tokens
from globe.errors import CheckpointError
from globe.evaluation.bootstrap import Interval
from globe.evaluation.perplexity import WindowSums, perplexity, rise, score
from globe.evaluation.text import sliding_windows

TOKENS = 53
WINDOW, STRIDE = 16, 7


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    generator = torch.Generator().manual_seed(0)
    return Tokens(
        torch.randint(257, (TOKENS,), generator=generator),
        torch.randint(1, 5, (TOKENS,), generator=generator),
    )


@torch.no_grad()
def next_token(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of the token after `ids`, in float64."""
    return torch.log_softmax(model(ids[None]).logits[0, -1].double(), dim=0)


def slow(model: Any, original: Any, tokens: Tokens) -> dict[str, list[float]]:
    """Sums of every window, one forward pass for every token."""
    found: dict[str, list[float]] = {name: [] for name in ("nll", "nll_original", "kl", "agreement")}
    for start, stop, scored in sliding_windows(TOKENS, window=WINDOW, stride=STRIDE):
        sums = dict.fromkeys(found, 0.0)
        for target in range(stop - scored, stop):
            q, p = (next_token(one, tokens.ids[start:target]) for one in (model, original))
            sums["nll"] -= float(q[tokens.ids[target]])
            sums["nll_original"] -= float(p[tokens.ids[target]])
            sums["kl"] += float((p.exp() * (p - q)).sum())
            sums["agreement"] += float(int(p.argmax()) == int(q.argmax()))
        for name, value in sums.items():
            found[name].append(value)
    return found


def test_the_sums_of_every_window_are_those_of_a_loop_over_its_tokens(
    model: Any, other: Any, tokens: Tokens
) -> None:
    windows = sliding_windows(TOKENS, window=WINDOW, stride=STRIDE)
    sums = score(other, tokens, windows, original=model, batch=3)
    for name, expected in slow(other, model, tokens).items():
        found = getattr(sums, name)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert int(sums.tokens.sum()) == TOKENS - 1
    assert int(sums.bytes.sum()) == int(tokens.bytes[1:].sum())
    assert float(sums.kl.sum() / sums.tokens.sum()) > 0.01
    assert 0 < int(sums.agreement.sum()) < TOKENS - 1


def test_equal_models_do_not_diverge(model: Any, tokens: Tokens) -> None:
    windows = sliding_windows(TOKENS, window=WINDOW, stride=STRIDE)
    sums = score(model, tokens, windows, original=model, batch=2)
    assert float(sums.kl.abs().max()) < 1e-6 * TOKENS
    torch.testing.assert_close(sums.nll, sums.nll_original, rtol=1e-6, atol=0)
    assert torch.equal(sums.agreement, sums.tokens)


def test_neither_batches_nor_pieces_change_anything(
    model: Any, other: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = sliding_windows(TOKENS, window=WINDOW, stride=STRIDE)
    sums = score(other, tokens, windows, original=model, batch=1)
    monkeypatch.setattr(module, "AT_ONCE", 3 * 257)
    pieces = score(other, tokens, windows, original=model, batch=64)
    for name in ("nll", "nll_original", "kl", "agreement"):
        torch.testing.assert_close(getattr(sums, name), getattr(pieces, name), rtol=1e-5, atol=1e-6)


def test_a_model_that_always_gives_all_logits_is_read_at_its_end(model: Any, tokens: Tokens) -> None:
    class Plain:
        def forward(self, ids: Tensor, use_cache: bool) -> Any:
            return model(ids, use_cache=use_cache)

        __call__ = forward

    windows = sliding_windows(TOKENS, window=WINDOW, stride=STRIDE)
    torch.testing.assert_close(score(Plain(), tokens, windows).nll, score(model, tokens, windows).nll)


def test_only_the_logits_that_count_are_asked_for(model: Any, tokens: Tokens) -> None:
    asked = []

    class Spy:
        def forward(self, ids: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
            assert use_cache is False
            asked.append((tuple(ids.shape), logits_to_keep))
            return model(ids, use_cache=use_cache, logits_to_keep=logits_to_keep)

        __call__ = forward

    windows = sliding_windows(TOKENS, window=WINDOW, stride=STRIDE)
    progress: list[int] = []
    score(Spy(), tokens, windows[1:], batch=4, on_batch=progress.append)
    assert asked[0] == ((4, WINDOW), STRIDE + 1)
    assert sum(progress) == len(windows) - 1


def test_logits_that_are_not_finite_are_one_sentence(tokens: Tokens) -> None:
    class Broken:
        def forward(self, ids: Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"logits": torch.full((*ids.shape, 257), math.nan)})

        __call__ = forward

    windows = sliding_windows(TOKENS, window=WINDOW, stride=STRIDE)
    with pytest.raises(CheckpointError, match="not finite: evaluate with dtype"):
        score(Broken(), tokens, windows)


def sums_of(nll: list[float], nll_original: list[float]) -> WindowSums:
    w = len(nll)
    return WindowSums(
        tokens=torch.full((w,), 4.0, dtype=torch.float64),
        bytes=torch.full((w,), 10.0, dtype=torch.float64),
        nll=torch.tensor(nll, dtype=torch.float64),
        nll_original=torch.tensor(nll_original, dtype=torch.float64),
    )


def test_figures_of_known_sums() -> None:
    """A coin for every byte: 10 bits in 10 bytes of 4 tokens."""
    sums = sums_of([10 * math.log(2)] * 9, [5 * math.log(2)] * 9)
    own = perplexity(sums.nll, sums, seed=0)
    assert own.bits_per_byte == pytest.approx(1)
    assert own.byte_perplexity == pytest.approx(2)
    assert own.perplexity == pytest.approx(2**2.5)
    assert own.perplexity_interval == pytest.approx((2**2.5, 2**2.5))
    assert own.bits_per_byte_interval == pytest.approx((1, 1))
    against = rise(sums, seed=0)
    assert against.ratio == pytest.approx(2**1.25)
    assert against.perplexity == pytest.approx(2**2.5 - 2**1.25)
    assert against.ratio_interval == pytest.approx((2**1.25, 2**1.25))


def test_the_interval_of_a_ratio_is_paired() -> None:
    """Windows differ much, the two models on each of them by 1 %: the ratio is known well, the levels are not."""
    generator = torch.Generator().manual_seed(3)
    hard = torch.rand(40, generator=generator, dtype=torch.float64) * 10 + 4
    sums = sums_of((hard * 1.01).tolist(), hard.tolist())
    own, against = perplexity(sums.nll, sums, seed=0), rise(sums, seed=0)
    assert isinstance(own.perplexity_interval, Interval)
    assert isinstance(against.ratio_interval, Interval)
    low, high = own.perplexity_interval
    assert high / low > 1.3
    low, high = against.ratio_interval
    assert 1 < low <= against.ratio <= high
    assert high - low < 0.01


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    sums = sums_of([4 * 800.0] * 9, [4.0] * 9)
    assert perplexity(sums.nll, sums, seed=0).perplexity == math.inf
    assert rise(sums, seed=0).ratio == math.inf


def test_this_is_the_perplexity_of_the_model_card() -> None:
    """MODEL_CARD.md: 65.5 on windows of 256 without overlap; here on a piece of the text, beside a plain loop."""
    from transformers import AutoTokenizer

    import globe.embedded
    from globe.calibration.text import tokenise
    from globe.evaluation.subject import open_subject
    from globe.evaluation.text import read_text

    subject, _ = open_subject("embedded", "none")
    embedded = subject.load(dtype=torch.float32, device=torch.device("cpu"), S_cache=None)
    tokenizer = AutoTokenizer.from_pretrained(str(Path(globe.embedded.path())))
    text = tokenise(read_text("embedded").content, tokenizer, max_tokens=2048)
    sums = score(embedded, text, sliding_windows(2048, window=256, stride=256), batch=6)
    nll = []
    for part in text.ids.split(256):
        with torch.no_grad():
            logits = embedded(part[None]).logits[0, :-1].double()
        nll.append(float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum")))
    assert int(sums.tokens.sum()) == 8 * 255
    torch.testing.assert_close(sums.nll, torch.tensor(nll, dtype=torch.float64), rtol=1e-4, atol=1e-3)
    assert 30 < perplexity(sums.nll, sums, seed=0).perplexity < 90
