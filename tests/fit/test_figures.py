"""The figures of a bank: gathered under the right names, from what is exported."""

from __future__ import annotations

import json

import pytest
import torch

from globe.am.records import Factors, FitResult, StopReason
from globe.bank.compose import mixed_bases
from globe.bank.record import BankArtefact, Member
from globe.files import parse_record, plain_record
from globe.fit.figures import (
    bank_charts,
    bank_figures,
    expert_relfrob,
    expert_spectra,
    expert_spread,
    jaccard_figures,
)
from globe.fit.finalise import Finalised, finalise
from globe.fit.normalise import Joined, join, normalise
from globe.numerics.figures import squared_norms
from globe.runs.chart_data import MOST_ATOMS, MOST_CODES, MOST_RANKS, BankCharts, largest, spread_out
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
    figures = bank_figures(expert_spread(X), expert_spectra(X), result, done, step_record(4))
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
    X, result, done = planted
    assert "temperature" not in bank_figures(expert_spread(X), expert_spectra(X), result, done, None)


def test_an_infinite_figure_is_none(planted: tuple[torch.Tensor, FitResult, Finalised]) -> None:
    X, result, done = planted
    unused = done.factors.codes.clone()
    unused[:, 2] = 0  # an atom nobody uses: the codes have no full rank
    done = done._replace(factors=done.factors._replace(codes=unused))
    assert bank_figures(expert_spread(X), expert_spectra(X), result, done, None)["code_condition"] is None


def test_error_of_each_expert(planted: tuple[torch.Tensor, FitResult, Finalised]) -> None:
    X, _, done = planted
    each = expert_relfrob(done)
    weighted = sum(one**2 * float(x.double().square().sum()) for one, x in zip(each, X, strict=True))
    assert weighted == pytest.approx(float(done.errors.sum()))


def test_jaccard_needs_both_families_of_a_layer() -> None:
    up = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    gate = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    nothing = {"support_jaccard": None}
    assert jaccard_figures({(1, "up"): up}) == nothing
    assert jaccard_figures({(1, "up"): up, (2, "gate"): gate}) == nothing
    both = {(1, "up"): up, (1, "gate"): gate, (2, "up"): up, (2, "gate"): up}
    assert jaccard_figures(both) == {
        "support_jaccard": pytest.approx(((1 / 3 + 1) / 2 + 1) / 2),
        "support_jaccard_layer001": pytest.approx((1 / 3 + 1) / 2),
        "support_jaccard_layer002": 1.0,
    }
    assert jaccard_figures({(1, "up"): up, (1, "gate"): gate[:, :2]}) == nothing


def test_spectra_of_large_experts_are_sampled(
    planted: tuple[torch.Tensor, FitResult, Finalised], monkeypatch: pytest.MonkeyPatch
) -> None:
    X, _, _ = planted
    monkeypatch.setattr("globe.fit.figures._SPECTRUM_BUDGET", 5 * P * P * D)
    assert len(expert_spectra(X).rows) == 5
    monkeypatch.setattr("globe.fit.figures._SPECTRUM_BUDGET", 1)
    assert expert_spectra(X).rows == (0, 1, 3, 5)


@pytest.mark.parametrize(
    ("centre", "scale"), [("scalar", "family"), ("expert_mean", "row"), ("none", "none")]
)
def test_charts_show_the_shares_and_both_spectra_in_normalised_units(centre: str, scale: str) -> None:
    """Two members, each with its own mean and scale; the rebuilt experts are put back by hand."""
    generator = torch.Generator().manual_seed(1)
    parts = [
        normalise(
            loc + size * torch.randn(n, P, D, generator=generator, dtype=torch.float64),
            centre=centre,
            scale=scale,
        )
        for n, loc, size in ((4, 3.0, 2.0), (2, -1.0, 0.5))
    ]
    joined = join(parts)
    codes = torch.rand(N, M, generator=generator, dtype=torch.float64) + 0.5
    codes[2, 1] = 0
    factors = Factors(
        torch.randn(M, R, D, generator=generator, dtype=torch.float64),
        codes,
        torch.randn(N, P, R, generator=generator, dtype=torch.float64),
    )
    done = finalise(factors, joined, lam=0.5, activation="silu", export_dtype=torch.float64, prune=0.0)
    members = (Member(3, "up", 0, 4, (0, 1, 2, 3)), Member(4, "up", 4, 6, (0, 1)))
    artefact = BankArtefact(
        members,
        done.factors.codes,
        done.factors.adapters,
        "silu",
        0.5,
        bank=done.factors.bank,
        mean=done.mean,
    )
    charts = bank_charts(expert_spectra(joined.experts), joined, artefact)
    assert (charts.code_experts, charts.code_atoms) == (tuple(range(N)), tuple(range(M)))
    assert charts.code_shares[2] == pytest.approx((codes[2] / codes[2].sum()).tolist(), abs=6e-4)
    assert charts.code_shares[2][1] == 0
    bases = mixed_bases(codes, factors.bank, lam=0.5, activation="silu")
    original = sum(torch.linalg.svdvals(x) for x in joined.experts) / N
    rebuilt = sum(torch.linalg.svdvals(A @ B) for A, B in zip(factors.adapters, bases, strict=True)) / N
    assert charts.spectrum_original == pytest.approx(original.tolist(), rel=1e-3)
    assert charts.spectrum_rebuilt[:R] == pytest.approx(rebuilt[:R].tolist(), rel=1e-3)
    assert max(charts.spectrum_rebuilt[R:]) < 1e-6 * charts.spectrum_rebuilt[0]
    assert parse_record(BankCharts, json.loads(json.dumps(plain_record(charts)))) == charts


def test_charts_of_a_large_bank_stay_small() -> None:
    n, m, p, d, r = 300, 90, 70, 71, 2
    generator = torch.Generator().manual_seed(2)
    X = torch.randn(n, p, d, generator=generator)
    codes = torch.rand(n, m, generator=generator) + 0.1
    codes[:, 10:40] = 0  # atoms nobody uses are the ones to leave out
    artefact = BankArtefact(
        (Member(0, "up", 0, n, tuple(range(n))),),
        codes,
        torch.randn(n, p, r, generator=generator),
        "identity",
        0.0,
        bank=torch.randn(m, r, d, generator=generator),
    )
    spectra = expert_spectra(X[:40])
    charts = bank_charts(spectra, Joined(X, None, None, (0, n)), artefact)
    used = set(range(m)) - set(range(10, 40))
    assert len(charts.code_atoms) == MOST_ATOMS
    assert used < set(charts.code_atoms)
    assert len(charts.code_experts) == MOST_CODES // MOST_ATOMS
    assert (charts.code_experts[0], charts.code_experts[-1]) == (0, n - 1)
    assert len(charts.spectrum_ranks) == len(charts.spectrum_original) == MOST_RANKS < p
    assert (charts.spectrum_ranks[0], charts.spectrum_ranks[-1]) == (1, p)
    assert len(charts.spectrum_experts) == 16


def test_chosen_positions() -> None:
    assert spread_out(5, 9) == [0, 1, 2, 3, 4]
    assert spread_out(11, 3) == [0, 5, 10]
    assert spread_out(11, 1) == [0]
    assert largest([3.0, 1.0, 3.0, 2.0], 2) == [0, 2]
    assert largest([1.0, 1.0, 1.0], 2) == [0, 1]
