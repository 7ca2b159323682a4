"""Methods that round the weights: beside their definitions, and as runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from globe.bank.compose import rebuild
from globe.bank.feedback import round_with_feedback
from globe.bank.file import read_artefact
from globe.bank.rotation import rotation
from globe.bank.rounding import Grid, LevelGrid, round_nearest
from globe.baselines.rounded_weights import round_weights
from globe.config.choices import Metric
from globe.config.composition import to_config
from globe.config.schema import chosen_metric
from globe.errors import ConfigError
from run_support import EMBEDDED, composed, run_in

N, P, D = 3, 12, 20


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments() -> Tensor:
    x = normal(N, 40, D, seed=1) * torch.logspace(0, 1, D) + 4 * normal(N, 40, 1, seed=2)
    return x.mT @ x / 40


def test_nearest_rounding_is_that_of_every_row() -> None:
    W = normal(N, P, D)
    found = round_weights(W, Grid.of(3, D, 8))
    assert torch.equal(found.packed.values(), round_nearest(W, Grid.of(3, D, 8)).values())
    assert torch.equal(found.basis, torch.eye(D))
    assert found.packed.nbytes == N * P * (D * 3 // 8 + 1 + 2 * 3)


def test_feedback_is_in_the_moments_of_each_expert() -> None:
    W, C = normal(N, P, D), moments()
    found = round_weights(W, Grid.of(3, D, 8), moments=lambda part: C[part]).packed.values()
    for i in range(N):
        own = round_with_feedback(W[i : i + 1], C[i : i + 1], Grid.of(3, D, 8)).values()
        torch.testing.assert_close(found[i : i + 1], own)

    def error(values: Tensor) -> float:
        return float((((values - W) @ C) * (values - W)).sum())

    assert error(found) < 0.7 * error(round_weights(W, Grid.of(3, D, 8)).packed.values())


@pytest.mark.parametrize("seed", [None, 5])
def test_feedback_of_down_is_in_the_moments_of_its_rows(seed: int | None) -> None:
    W = normal(N, P, D)
    h = normal(N, 30, P, seed=1) * torch.logspace(0, 1, P) + 4 * normal(N, 30, 1, seed=2)
    H, eye = h.mT @ h / 30, torch.eye(D).expand(N, D, D)

    def error(**options: object) -> float:
        one = round_weights(W, Grid.of(3, D, D), seed=seed, **options)
        E = one.packed.values() @ one.basis - W
        return float((E * (H @ E)).sum())

    blind = error(moments=lambda part: eye[part])
    assert error(moments=lambda part: eye[part], coupled=lambda part: H[part]) < 0.7 * blind


def test_rotated_rounding_is_rounding_of_the_rotated_weights() -> None:
    W, C = normal(N, P, D), moments()
    found = round_weights(W, Grid.of(3, D, 8), moments=lambda part: C[part], seed=5)
    rows, basis = rotation(P, 5), rotation(D, 6)
    inner = round_with_feedback(rows @ W @ basis.T, basis @ C @ basis.T, Grid.of(3, D, 8)).values()
    torch.testing.assert_close(found.packed.values() @ found.basis, rows.T @ inner @ basis)
    # an outlier spoils the scale of its group, unless it is rotated away
    W[:, 0, 0] = 60.0

    def error(seed: int | None) -> float:
        one = round_weights(W, Grid.of(3, D, D), seed=seed)
        return float((one.packed.values() @ one.basis - W)[:, 0, 1:].square().sum())

    assert error(5) < 0.5 * error(None)


@pytest.mark.parametrize("options", [["method=rtn"], ["method=gptq"], ["method=gptq_rotated"]])
def test_runs_store_rounded_weights(tmp_path: Path, options: list[str]) -> None:
    _, folder = run_in(tmp_path, *options, "bank.bits=3", "layer=12")
    summary = json.loads((folder / "summary.json").read_text())["banks"][0]
    artefact = read_artefact(folder / "banks" / "layer012.up")
    assert set(artefact.packed) == {"adapters"}
    assert artefact.family_parameters == EMBEDDED.n * EMBEDDED.p * EMBEDDED.d
    assert summary["metrics"]["bits_per_weight"] == pytest.approx(3 + 16 / 64, abs=0.01)
    assert artefact.mean is not None
    assert summary["metrics"]["bytes"] == artefact.packed["adapters"].nbytes + artefact.mean.nbytes
    assert 0.1 < summary["relfrob"] < 0.3
    assert bool(torch.isfinite(rebuild(artefact)).all())


@pytest.mark.parametrize("method", ["gptq", "gptq_rotated"])
def test_within_a_size_rows_of_all_banks_share_the_bits(tmp_path: Path, method: str) -> None:
    options = (f"method={method}", "bank.bits=null", "bank.size=0.2", "budget.over=model")
    _, folder = run_in(tmp_path, *options, "layer=[4,12]", "family=up")
    banks = json.loads((folder / "summary.json").read_text())["banks"]
    held = sum(one["metrics"]["bytes"] for one in banks)
    allowed = 0.2 * sum(2 * one["parameters"] for one in banks)
    assert 0.94 * allowed <= held <= allowed
    grid = read_artefact(folder / "banks" / "layer012.up").packed["adapters"].grid
    assert isinstance(grid, LevelGrid)
    assert grid.levels.unique().numel() > 1


def test_rotated_columns_leave_rows_what_they_are() -> None:
    W, C = normal(N, P, D), moments()
    found = round_weights(W, Grid.of(4, D, D), moments=lambda part: C[part], seed=5, whole_rows=True)
    inner = round_with_feedback(W @ rotation(D, 6).T, rotation(D, 6) @ C @ rotation(D, 6).T, Grid.of(4, D, D))
    torch.testing.assert_close(found.packed.values(), inner.values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["method=rtn", "bank.bits=null", "bank.size=0.2"],
            "bank.size=0.2 is not possible: give null with method=rtn",
        ),
        (["method=rtn", "bank.bits=2.5"], "bank.bits=2.5 is not possible: give an integer"),
        (["method=rtn", "bank.bits=null"], "bank.bits=None is not possible: give an integer"),
        (["method=rtn", "bank.kept=0.5"], "bank.kept=0.5 is not possible: give null with method=rtn"),
        (["method=gptq", "normalise.metric=none"], "normalise.metric='none' is not possible"),
    ],
)
def test_options_that_contradict_rounding_are_refused(options: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        to_config(composed(*options))


@pytest.mark.parametrize("method", ["gptq", "gptq_rotated"])
def test_errors_are_fed_back_in_the_inputs_of_a_text(method: str) -> None:
    assert chosen_metric(to_config(composed(f"method={method}"))) is Metric.experts
    assert chosen_metric(to_config(composed(f"method={method}", "calibrate.text=embedded"))) is Metric.inputs
    given = composed(f"method={method}", "calibrate.text=embedded", "normalise.metric=experts")
    assert chosen_metric(to_config(given)) is Metric.experts
