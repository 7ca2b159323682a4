"""The trainer of the benchmark models: exact upcycling, sizes, losses, and the figures in its cards."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

TRAINER = Path(__file__).parents[2] / "experiments" / "train_moe"
sys.path.insert(0, str(TRAINER))

import fit  # noqa: E402  these stand beside the script, not in a package
import measure  # noqa: E402
import text  # noqa: E402
from architectures import (  # noqa: E402
    ARCHITECTURES,
    Sizes,
    build,
    dense_config,
    expert_matrices,
    expert_modules,
    moe_config,
)
from reshape import reshape  # noqa: E402
from upcycle import upcycle  # noqa: E402

SIZES = Sizes(vocabulary=61, layers=2, columns=20, rows=12, experts=6, top_k=2, heads=5, shared=3, context=32)


def test_upcycled_model_equals_the_dense_one_when_every_piece_is_chosen_once() -> None:
    sizes = Sizes(
        vocabulary=61, layers=2, columns=20, rows=12, experts=3, top_k=3, heads=5, shared=4, context=32
    )
    dense = build(dense_config(sizes), seed=0)
    moe = build(moe_config("qwen2_moe", sizes, aux_loss=0.0), seed=1)
    upcycle(dense, moe, top_k=3, fresh=0.0, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for layer in moe.model.layers:
            layer.mlp.gate.weight.zero_()  # even routing: each expert weighs 1/3
            layer.mlp.shared_expert.down_proj.weight.zero_()
    rows = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(moe(rows).logits, dense(rows).logits, rtol=1e-4, atol=1e-5)


def test_upcycling_leaves_the_fresh_share_of_neurons_untouched() -> None:
    dense = build(dense_config(SIZES), seed=0)
    moe = build(moe_config("qwen2_moe", SIZES, aux_loss=0.0), seed=1)
    before = expert_matrices(moe)
    upcycle(dense, moe, top_k=2, fresh=0.25, generator=torch.Generator().manual_seed(2))
    after = expert_matrices(moe)
    dense_up = dense.model.layers[1].mlp.up_proj.weight
    for expert in range(SIZES.experts):
        untouched = (after[1]["up"][expert] == before[1]["up"][expert]).all(1)
        assert int(untouched.sum()) == 3
        copied = after[1]["up"][expert][~untouched]
        assert (copied[:, None] == dense_up[None]).all(-1).any(1).all()


ROWS = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(3))


def trained_and_wider(**changes: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model with four heads of 8, and a random one that `changes` make different."""
    sizes = replace(SIZES, columns=32, heads=4)
    source = build(moe_config("qwen2_moe", sizes, aux_loss=0.0), seed=0)
    with torch.no_grad():
        for name, weight in source.named_parameters():
            if "self_attn" in name:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return source, build(moe_config("qwen2_moe", replace(sizes, **changes), aux_loss=0.0), seed=1)


@torch.no_grad()
def test_wider_experts_and_a_head_of_its_own_begin_where_the_trained_model_is() -> None:
    source, target = trained_and_wider(rows=16, tied=False)
    before = expert_matrices(target)
    reshape(source, target, ROWS)
    for old, fresh, now in zip(expert_matrices(source), before, expert_matrices(target), strict=True):
        for family in ("gate", "up"):
            assert torch.equal(now[family][:, :12], old[family])
            assert torch.equal(now[family][:, 12:], fresh[family][:, 12:])
    assert target.lm_head.weight.data_ptr() != target.model.embed_tokens.weight.data_ptr()
    for module in expert_modules(target):
        module.down_proj[:, :, 12:] = 0  # without its new neurons it is the model it comes from
    torch.testing.assert_close(target(ROWS).logits, source(ROWS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_merged_head_adds_the_scores_of_its_heads() -> None:
    """Heads 1 and 3 have no values of their own and score nothing, so heads 0 and 2 go on as they were."""
    source, target = trained_and_wider(heads=2)
    for layer in source.model.layers:
        for vector in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            for head in (1, 3):
                vector.weight[8 * head : 8 * head + 8] = 0
                vector.bias[8 * head : 8 * head + 8] = 0
    reshape(source, target, ROWS)
    assert target.config.num_attention_heads == 2
    torch.testing.assert_close(target(ROWS).logits, source(ROWS).logits, rtol=1e-4, atol=1e-5)
    layer = source.model.layers[0].self_attn
    layer.q_proj.weight[8:16] = 0.3
    reshape(source, target, ROWS)
    assert (target(ROWS).logits - source(ROWS).logits).abs().max() > 1e-3


@torch.no_grad()
def test_experts_are_scaled_up_where_routing_weights_no_longer_sum_to_one() -> None:
    source, target = trained_and_wider(raw_routing=True)
    for layer in source.model.layers:
        layer.mlp.gate.weight.zero_()  # even: the two chosen of six experts have a third of the probability
    reshape(source, target, ROWS)
    assert target.config.norm_topk_prob is False
    torch.testing.assert_close(target(ROWS).logits, source(ROWS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture_has_the_sizes_asked_for(architecture: str) -> None:
    model = build(moe_config(architecture, SIZES, aux_loss=0.0), seed=0)
    matrices = expert_matrices(model)
    assert len(matrices) == SIZES.layers
    assert {tuple(one[family].shape) for one in matrices for family in ("up", "gate")} == {(6, 12, 20)}
    rows = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = fit.training_loss(model, rows, aux_loss=0.01, top_k=2)
    loss.backward()
    assert all(module.gate_up_proj.grad.abs().sum() > 0 for module in expert_modules(model))


def test_balance_loss_is_one_when_even_and_n_over_k_when_one_group_takes_all() -> None:
    even = torch.eye(4).repeat(5, 1) * 20
    assert float(fit.balance_loss(even, top_k=1)) == pytest.approx(1.0, abs=1e-6)
    lone = torch.tensor([[30.0, 30.0, 0.0, 0.0, 0.0, 0.0]]).repeat(7, 1)
    assert float(fit.balance_loss(lone, top_k=2)) == pytest.approx(3.0, abs=1e-6)


def test_learning_rate_warms_up_to_its_peak_and_ends_at_a_twentieth() -> None:
    rates = [fit.learning_rate(step / 1000, peak=2.0) for step in range(1001)]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(2.0)
    assert rates.index(max(rates)) == 20
    assert rates[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(rates[20:]))


def test_windows_show_every_window_of_an_epoch_once() -> None:
    draw = fit.windows(torch.arange(101), context=10, batch=3, generator=torch.Generator().manual_seed(0))
    first = torch.cat([draw() for _ in range(3)])
    assert (first.diff(dim=1) == 1).all()
    assert len(first[:, 0].unique()) == 9


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    model = build(moe_config("mixtral", SIZES, aux_loss=0.0), seed=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokens = torch.randint(61, (200,), generator=torch.Generator().manual_seed(0))
    assert measure.perplexity(model, tokens, window=32) == pytest.approx(61, rel=1e-5)


def test_expert_load_counts_every_routed_pair_of_every_layer() -> None:
    model = build(moe_config("olmoe", SIZES, aux_loss=0.0), seed=0)
    tokens = torch.randint(61, (5 * 32 + 9,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        router = model.model.layers[1].mlp.gate.weight
        router.zero_()
        router[2] = 1e3 * torch.ones(20)  # expert 2 wins or loses by the sign of the token's sum
    loads = measure.expert_load(model, tokens, window=32, top_k=2, batch=3)
    whole = model(tokens[:160].view(5, 32), output_router_logits=True).router_logits
    for load, logits in zip(loads, whole, strict=True):
        assert float(load.sum()) == pytest.approx(1.0)
        chosen = logits.topk(2, dim=-1).indices
        for expert in range(SIZES.experts):
            assert float(load[expert]) == pytest.approx(float((chosen == expert).double().mean()), abs=1e-6)


def test_zeroed_experts_give_zero_and_come_back() -> None:
    model = build(moe_config("olmoe", SIZES, aux_loss=0.0), seed=0)
    rows = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = model(rows).logits
    with measure.zeroed(model, [1]):
        assert not expert_modules(model)[1].down_proj.any()
        assert expert_modules(model)[0].down_proj.any()
        without = model(rows).logits
    assert not torch.allclose(whole, without)
    torch.testing.assert_close(model(rows).logits, whole, rtol=0, atol=1e-5)


def test_spectrum_figures_find_planted_rank_and_planted_shared_basis() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(6, 12, 3, generator=generator)
    own = torch.linalg.qr(torch.randn(6, 20, 3, generator=generator)).Q.mT
    figures = measure.spectrum_figures(left @ own, rank=3)
    assert figures["effective_rank"] <= 3
    assert figures["svd_error"] < 1e-6
    assert figures["shared_error"] > 0.3
    shared = torch.randn(6, 12, 6, generator=generator) @ torch.randn(6, 20, generator=generator)
    figures = measure.spectrum_figures(shared, rank=3)
    assert figures["shared_error"] < 1e-6
    assert figures["svd_error"] > 0.1


def test_similarity_tells_untouched_from_fresh() -> None:
    start = torch.randn(6, 12, 20, generator=torch.Generator().manual_seed(0))
    other = torch.randn(6, 12, 20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(measure.similarity(3 * start, start), torch.ones(6))
    assert measure.similarity(other, start).abs().max() < 0.3


def test_split_keeps_every_25th_piece_and_loses_no_character(tmp_path: Path) -> None:
    whole = "".join(chr(33 + index % 90) for index in range(4096 * 53 + 7))
    path = tmp_path / "text.txt"
    path.write_text(whole)
    training, validation = text.split([path])
    assert validation == whole[24 * 4096 : 25 * 4096] + whole[49 * 4096 : 50 * 4096]
    assert len(training) + len(validation) == len(whole)


@pytest.mark.slow
def test_trainer_writes_a_checkpoint_that_learned_and_a_card(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog and the dog sleeps on. " * 2500)
    out = tmp_path / "model"
    command = [
        sys.executable, str(TRAINER / "train.py"), "--text", str(corpus), "--heldout", str(corpus),
        "--out", str(out), "--architecture", "qwen2_moe", "--layers", "2", "--rows", "12", "--columns", "20",
        "--experts", "6", "--top-k", "2", "--heads", "5", "--vocabulary", "300", "--context", "32",
        "--upcycle-steps", "10", "--steps", "30", "--evaluate-every", "10",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    card = (out / "README.md").read_text()
    perplexity = float(card.split("Held-out perplexity **")[1].split("**")[0])
    assert perplexity < 150, "forty steps on one sentence must beat a guess among 300 tokens"
    assert "10 steps" in card
    assert "30 steps" in card
    assert (out / "model.safetensors").is_file()
    on = [
        *command[:-6],
        "--steps",
        "20",
        "--evaluate-every",
        "10",
        "--start",
        str(out),
        "--untied",
        "--raw-routing",
    ]
    on[on.index(str(out))] = str(tmp_path / "on")
    on[on.index("12")] = "16"
    done = subprocess.run(on, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "on" / "README.md").read_text()
    assert "on from `model`" in card
    assert float(card.split("Held-out perplexity **")[1].split("**")[0]) < perplexity
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert "is not empty: name a new folder" in again.stderr
