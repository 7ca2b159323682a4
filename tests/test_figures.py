"""The figures of a bank: gathered under the right names, from what is exported."""

from __future__ import annotations

import pytest
import torch

from globe.am.records import Factors, FitResult, StopReason
from globe.compose import mixed_bases
from globe.figures import bank_figures, expert_relfrob, mean_jaccard
from globe.finalise import Finalised, finalise
from globe.metrics import squared_norms
from globe.normalise import normalise
from run_support import step_record

N, P, D, M, R = 6, 7, 11, 3, 4


@pytest.fixture
def planted() -> tuple[torch.Tensor, FitResult, Finalised]:
    """Experts near A M with codes whose supports are known."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(M, R, D, generator=generator)
    codes = torch.rand(N, M, generator=generator) + 0.5
    codes[0, 1:] = 0
    codes[1, 2] = 0
    adapters = torch.randn(N, P, R, generator=generator)
    bases = mixed_bases(codes, bank, lam=0.0, activation="identity")
    W = adapters @ bases + 0.1 * torch.randn(N, P, D, generator=generator)
    normalised = normalise(W, centre="scalar", scale="family")
    factors = Factors(bank, codes, adapters / normalised.scale)
    done = finalise(
        factors, normalised, lam=0.0, activation="identity", export_dtype=torch.float32, prune=1e-3
    )
    result = FitResult(
        factors,
        lam=0.0,
        stop=StopReason.steps,
        steps=4,
        relfrob_start=0.9,
        relfrob=0.1,
        energy_captured=0.97,
        accepted=3,
        rejected=1,
        regularised_solves=2,
        seconds=1.0,
    )
    return normalised.experts, result, done


def test_figures_agree_with_slow_formulas(planted: tuple[torch.Tensor, FitResult, Finalised]) -> None:
    X, result, done = planted
    figures = bank_figures(X, result, done, step_record(4))
    codes = done.factors.codes.double()
    supports = [sum(float(code) > 0 for code in row) for row in codes]
    assert supports == [1, 2, 3, 3, 3, 3]
    assert figures["support_mean"] == pytest.approx(sum(supports) / N)
    assert (figures["support_min"], figures["support_median"], figures["support_max"]) == (1, 3, 3)
    assert figures["zero_share"] == pytest.approx(3 / (N * M))
    assert figures["atom_usage_min"] == 4
    assert figures["code_l1"] == pytest.approx(float(codes.sum()) / N)
    assert figures["mse"] == pytest.approx(done.relfrob**2 * float(squared_norms(X).sum()) / X.numel())
    total = float(((X.double() - X.double().mean()) ** 2).sum())
    assert figures["explained_variance"] == pytest.approx(1 - float(done.errors.sum()) / total)
    assert figures["code_condition"] == pytest.approx(float(torch.linalg.cond(codes.T @ codes)), rel=1e-6)
    norms = [float(atom.norm()) for atom in done.factors.bank.double()]
    assert figures["atom_norm_max"] == pytest.approx(max(norms))
    assert (figures["accepted"], figures["rejected"], figures["regularised_solves"]) == (3, 1, 2)
    assert (figures["temperature"], figures["energy_captured"]) == (1.0, 0.97)
    assert figures["effective_rank_experts"] == N


def test_without_a_step_there_is_no_schedule_to_report(
    planted: tuple[torch.Tensor, FitResult, Finalised],
) -> None:
    assert "temperature" not in bank_figures(*planted, None)


def test_an_infinite_figure_is_none(planted: tuple[torch.Tensor, FitResult, Finalised]) -> None:
    X, result, done = planted
    unused = done.factors.codes.clone()
    unused[:, 2] = 0  # an atom nobody uses: the codes have no full rank
    done = done._replace(factors=done.factors._replace(codes=unused))
    assert bank_figures(X, result, done, None)["code_condition"] is None


def test_error_of_each_expert(planted: tuple[torch.Tensor, FitResult, Finalised]) -> None:
    X, _, done = planted
    each = expert_relfrob(done)
    weighted = sum(one**2 * float(x.double().square().sum()) for one, x in zip(each, X, strict=True))
    assert weighted == pytest.approx(float(done.errors.sum()))


def test_jaccard_needs_both_families_of_a_layer() -> None:
    up = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    gate = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert mean_jaccard({(1, "up"): up}) is None
    assert mean_jaccard({(1, "up"): up, (2, "gate"): gate}) is None
    both = {(1, "up"): up, (1, "gate"): gate, (2, "up"): up, (2, "gate"): up}
    assert mean_jaccard(both) == pytest.approx(((1 / 3 + 1) / 2 + 1) / 2)
    assert mean_jaccard({(1, "up"): up, (1, "gate"): gate[:, :2]}) is None


def test_spectra_of_large_experts_are_sampled(
    planted: tuple[torch.Tensor, FitResult, Finalised], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("globe.figures._SPECTRUM_BUDGET", 5 * P * P * D)
    assert bank_figures(*planted, None)["effective_rank_experts"] == 5
    monkeypatch.setattr("globe.figures._SPECTRUM_BUDGET", 1)
    assert bank_figures(*planted, None)["effective_rank_experts"] == 4
