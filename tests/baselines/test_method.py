"""`method=...`: every baseline in the place of a GloBE bank, with the same budget, artefact, figures and table."""

from __future__ import annotations

from pathlib import Path

import baseline_runs
import pytest
import torch

from globe.am.refit import refit
from globe.bank.compose import bases_of, rebuild
from globe.bank.file import read_artefact
from globe.bank.rounding import Grid, round_nearest
from globe.baselines import BaselineSizes
from globe.checkpoint import open_checkpoint
from globe.config.choices import ADAM_METHODS, WEIGHT_METHODS, Method
from globe.config.composition import plain, to_config
from globe.config.identity import run_name
from globe.config.schema import Config
from globe.fit.baseline import less_mean
from globe.fit.normalise import join, normalise
from globe.fit.plan import plan
from outlined_model import Model
from run_support import EMBEDDED, bytes_of, composed, lines, load, run_in

BASELINES = [method for method in Method if method is not Method.globe and method not in WEIGHT_METHODS]
FEW = ("model.max_experts=8", "bank.m=3", "bank.r=11", "export_dtype=float32")
n, p, d, m, r = 8, EMBEDDED.p, EMBEDDED.d, 3, 11
SAME = n * p * r + m * r * d + n * m
"""what the GloBE bank of these options keeps, beside its mean"""


def steps_of(method: Method) -> tuple[str, ...]:
    return ("train.steps=12",) if method in ADAM_METHODS else ()


@pytest.mark.parametrize("method", BASELINES)
def test_a_run_of_a_baseline_leaves_a_whole_folder_and_a_true_figure(
    tmp_path: Path, method: Method, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, folder = run_in(tmp_path, f"method={method}", "layer=3", *FEW, *steps_of(method))
    (bank,) = load(folder / "summary.json")["banks"]
    assert (bank["method"], bank["n"], bank["p"], bank["d"]) == (str(method), n, p, d)
    assert load(folder / "status.json")["state"] == "finished"
    # within the budget of the bank that it is compared with, and nearly all of it
    own = bank["kept_parameters"] - (method is not Method.mean_svd)  # the scalar mean
    assert own <= SAME
    assert own > 0.85 * SAME
    # the figure, from nothing but the checkpoint and the artefact
    W = open_checkpoint(None).read_experts(3, "up", max_experts=n).weights.double()
    artefact = read_artefact(folder / "banks" / "layer003.up")
    left = (W - rebuild(artefact).double()).norm()
    assert figure == pytest.approx(float(left / (W - W.mean()).norm()), rel=1e-5)
    assert bank["metrics"]["mse"] == pytest.approx(
        float(left**2 / (n * p * d) / (W - W.mean()).square().mean()), rel=1e-4
    )
    printed = capsys.readouterr().out
    assert str(method) in printed
    assert f"{figure:.4f}" in printed
    assert artefact.lam == (1.0 if method in ADAM_METHODS else 0.0)
    assert artefact.activation == ("silu" if method in ADAM_METHODS else "identity")
    recorded = [line["step"] for line in lines(folder)]
    assert recorded == ([0, 10, 12] if method in ADAM_METHODS else [])


@pytest.mark.parametrize("method", [Method.shared_basis, Method.mobe_corrected])
def test_the_error_is_that_of_the_method_itself(tmp_path: Path, method: Method) -> None:
    """Neither pruning nor a refit nor another budget between the baseline and the run."""
    figure, folder = run_in(tmp_path, f"method={method}", "layer=5", *FEW, *steps_of(method))
    (bank,) = load(folder / "summary.json")["banks"]
    X = normalise(
        open_checkpoint(None).read_experts(5, "up", max_experts=n).weights, centre="scalar", scale="family"
    ).experts
    sizes = {"m": m, "r": r} if method is Method.mobe_corrected else {"budget": SAME}
    alone = baseline_runs.run(
        str(method),
        X,
        **sizes,
        steps=12 if method in ADAM_METHODS else None,
        generator=torch.Generator().manual_seed(bank["seed"]),
    )
    assert bank["relfrob_fit"] == pytest.approx(alone.relfrob, rel=1e-6)
    assert figure == pytest.approx(alone.relfrob, rel=1e-5)


def test_rounding_is_part_of_the_figure(tmp_path: Path) -> None:
    figure, folder = run_in(tmp_path, "method=svd", "layer=3", *FEW[:-1], "export_dtype=bfloat16")
    (bank,) = load(folder / "summary.json")["banks"]
    assert bank["export_dtype"] == "bfloat16"
    assert 1e-7 < figure - bank["relfrob_fit"] < 1e-3


@pytest.mark.parametrize(("method", "most"), [(Method.shared_basis, 1.02), (Method.slbf, 0.8)])
def test_factors_of_a_baseline_are_rounded_with_feedback(tmp_path: Path, method: Method, most: float) -> None:
    """What rounding adds to the error is less than by plain rounding, but for rows that are orthonormal anyway."""
    few = ("bank.bits_A=3", "bank.bits_B=6", "bank.group_A=4")
    figure, folder = run_in(tmp_path, f"method={method}", "layer=3", *FEW, *few, *steps_of(method))
    artefact = read_artefact(folder / "banks" / "layer003.up")
    W = open_checkpoint(None).read_experts(3, "up", max_experts=n).weights.double()
    left = W - rebuild(artefact).double()
    assert figure == pytest.approx(float(left.norm() / (W - W.mean()).norm()), rel=1e-4)
    M = bases_of(artefact, slice(None)).double()
    A = refit(W - W.mean(), M).adapters
    nearest = round_nearest(A, Grid.of(3, A.shape[2], 4)).values().double()
    least, plain = ((W - W.mean() - own @ M).square().sum() for own in (A, nearest))
    assert float(left.square().sum() - least) < most * float(plain - least)
    (bank,) = load(folder / "summary.json")["banks"]
    assert bank["metrics"]["bytes"] < 0.3 * 4 * SAME


def test_every_method_joins_members_but_the_one_with_a_mean_of_its_own(tmp_path: Path) -> None:
    figure, folder = run_in(
        tmp_path, "method=group_svd", "family=both", "bank.scope=families", "layer=3", *FEW
    )
    artefact = read_artefact(folder / "banks" / "layer003.up+gate")
    assert (artefact.n, len(artefact.members)) == (16, 2)
    parts = [
        normalise(
            open_checkpoint(None).read_experts(3, family, max_experts=n).weights,
            centre="scalar",
            scale="family",
        )
        for family in ("up", "gate")
    ]
    X = join(parts).experts
    M = torch.einsum("nm,mrd->nrd", artefact.codes, artefact.bank)
    best = X - refit(X, M).adapters @ M
    assert figure == pytest.approx(float(best.norm() / X.norm()), rel=1e-4)  # its adapters are least squares


def test_a_finished_baseline_is_not_repeated_and_another_method_is_another_run(tmp_path: Path) -> None:
    options = ("layer=3", "method=group_svd", *FEW)
    figure, folder = run_in(tmp_path, *options)
    before = bytes_of(folder, "layer003.up")
    assert run_in(tmp_path, *options) == (figure, folder)
    assert bytes_of(folder, "layer003.up") == before
    names = {run_name(plain(composed(f"method={method}", *FEW))) for method in Method}
    assert len(names) == len(Method)
    assert not any("globe" in name.split("_")[1] for name in names)


def test_a_mean_expert_of_the_method_joins_the_stored_one() -> None:
    """W = scale X + mean stays true when a mean expert is taken out of X, for every way to centre and scale."""
    W = torch.randn(5, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own = torch.linspace(-1, 1, 77, dtype=torch.float64).view(7, 11)
    for centre in ("none", "scalar", "expert_mean"):
        for scale in ("none", "family"):
            joined = join([normalise(W, centre=centre, scale=scale)])
            less = less_mean(joined, own)
            factor = 1.0 if less.scale is None else less.scale[:, None, None]
            assert less.mean is not None
            assert less.mean.shape == (1, 7, 11)
            assert torch.allclose(factor * less.experts + less.mean, W, atol=1e-12)
            assert torch.allclose(less.experts + own, joined.experts)


# --- sizes ----------------------------------------------------------------------------------------------------------


def planned(*overrides: str) -> BaselineSizes:
    (bank,) = plan(to_config(composed("layer=12", *overrides)), Model())
    assert bank.baseline is not None
    assert (bank.sizes.m, bank.sizes.r, bank.sizes.atom_rank) == (
        bank.baseline.m,
        bank.baseline.r,
        bank.baseline.atom_rank,
    )
    return bank.baseline


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("budget", [("bank.m=3", "bank.r=13"), ("bank.kept=0.47",), ("bank.kept=0.2",)])
def test_no_baseline_keeps_more_than_its_budget(method: Method, budget: tuple[str, ...]) -> None:
    sizes = planned(f"method={method}", *budget)
    dense = 16 * 44 * 60
    limit = 16 * 44 * 13 + 3 * 13 * 60 + 16 * 3 if len(budget) == 2 else float(budget[0][10:]) * dense - 1
    if method is Method.mean_svd:
        limit += len(budget) == 1  # it has no other mean
    assert sizes.parameters <= limit
    assert sizes.parameters > limit - 0.08 * dense


def test_methods_with_a_bank_take_m_and_r_as_given() -> None:
    for method in ("group_svd", "mobe", "mobe_corrected"):
        sizes = planned(f"method={method}", "bank.m=3", "bank.r=13")
        assert (sizes.m, sizes.r) == (3, 13)
    filled = planned("method=slbf", "bank.m=3", "bank.r=13")
    assert (filled.m, filled.r) == (16, 13)
    assert planned("method=slbf", "bank.r=13", "bank.atom_rank=2").atom_rank == 2


def test_the_methods_trained_by_adam_take_more_steps_unless_told() -> None:
    for method in Method:
        config = to_config(composed(f"method={method}"))
        assert config.method is method
        assert config.train.steps == (2000 if method in ADAM_METHODS else Config().train.steps)
    assert to_config(composed("method=slbf", "train.steps=7")).train.steps == 7
