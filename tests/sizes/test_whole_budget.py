"""One budget for a whole model: closed-form curves, what the model feels, and runs that keep to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import globe
import globe.sizes.whole_budget
from globe.baselines import resolve_sizes, run_baseline
from globe.calibration.sensitivity import Sensitivity
from globe.checkpoint import open_checkpoint
from globe.checkpoint.in_memory import ExpertsInMemory
from globe.config.composition import to_config
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.fit.input_metric import second_moment_metric
from globe.fit.normalise import join, normalise
from globe.fit.plan import outline
from globe.runs.allocation import Allocation
from globe.sizes.curves import approximated, limits, spectrum
from globe.sizes.gain import Gain
from globe.sizes.sizing import Sizing
from globe.sizes.whole_budget import spread_budget
from run_support import EMBEDDED, composed, load, run_in

N, P, D = 7, 11, 13


def experts(scale: float = 1.0, seed: int = 0) -> Tensor:
    """Experts whose columns are far from equal."""
    draw = torch.Generator().manual_seed(seed)
    columns = torch.linspace(2.0, 0.05, D, dtype=torch.float64)
    return scale * torch.randn(N, P, D, generator=draw, dtype=torch.float64) * columns + 0.1


def size_of(r: int) -> int:
    return N * P * r + r * D + N


# --- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 4, 9, D])
def test_the_curve_is_the_error_of_a_shared_basis_of_that_size(r: int) -> None:
    X = normalise(experts(), centre="scalar", scale="family").experts
    basis = spectrum(X, None)
    slow = run_baseline(X, resolve_sizes("shared_basis", n=N, p=P, d=D, r=r)).relfrob ** 2
    assert basis.rows(size_of(r)) == r
    assert basis.rows(size_of(r) - 1) == r - 1
    assert basis.error(size_of(r)) == pytest.approx(slow, abs=1e-12)
    assert basis.left[0] == pytest.approx(1.0)
    assert list(basis.left) == sorted(basis.left, reverse=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_tried_on_the_model_has_the_error_of_the_curve(weighted: bool) -> None:
    W = experts(scale=30.0)
    joined = join([normalise(W, centre="scalar", scale="expert")])
    X = joined.experts
    metric = second_moment_metric(X) if weighted else None
    basis = spectrum(X, metric)
    rebuilt = approximated(joined, metric, basis, size_of(5))
    assert rebuilt.shape == W.shape
    scale = joined.scale
    assert scale is not None
    left = (rebuilt - W) / scale[:, None, None]
    seen, whole = (left, X) if metric is None else (metric.seen(one, slice(0, N)) for one in (left, X))
    assert float(seen.square().sum() / whole.square().sum()) == pytest.approx(
        basis.error(size_of(5)), rel=1e-9
    )


def test_levels_hold_the_run_s_own_share_and_everything() -> None:
    sizes = limits(1000, 0.47)
    assert 470 in sizes
    assert sizes[-1] == 1000
    assert list(sizes) == sorted(set(sizes))


# --- spreading --------------------------------------------------------------------------------------------------------


def felt(loud: Sequence[tuple[int, str]]) -> Any:
    """In the place of a measurement: some (layer, family) matter a thousand times as much as the others."""

    def sensitivities(
        checkpoint: object, options: object, candidates: Any, places: Any, **rest: object
    ) -> Any:
        found = []
        for layer, family in places:
            (weights,) = candidates(layer, family)
            assert weights.shape == (EMBEDDED.n, EMBEDDED.p, EMBEDDED.d) or family == "down"
            found.append(Sensitivity(layer, family, 0, 1.0 if (layer, family) in loud else 1e-3))
        return tuple(found)

    return sensitivities


SHORT = "train.steps=2"


def spread(config: Config, file: Path) -> Allocation:
    checkpoint = open_checkpoint(None)
    sizing = Sizing(checkpoint, torch.device("cpu"), quiet=True)
    return spread_budget(config, outline(config, checkpoint), sizing, file)


def test_a_layer_that_matters_more_gets_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(globe.sizes.whole_budget, "sensitivities", felt([(3, "up"), (4, "gate")]))
    words = [
        "bank.kept=0.5",
        "budget.over=model",
        "layer=3-5",
        "family=both",
        "calibrate.text=embedded",
        SHORT,
    ]
    found = spread(to_config(composed(*words)), tmp_path / "a.json")
    assert found.measured
    shares = {one.key: one.kept for one in found.shares}
    quiet = [share for key, share in shares.items() if key not in ("layer003.up", "layer004.gate")]
    assert min(shares["layer003.up"], shares["layer004.gate"]) > 0.7 > max(quiet)
    assert found.used <= 0.5
    assert sum(one.loss for one in found.shares) < 0.5 * sum(one.uniform_loss for one in found.shares)
    for one in found.shares:
        assert one.uniform_loss <= one.sensitivity  # which a shared basis alone was measured with


def test_without_a_text_errors_count_alike_and_the_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = to_config(composed("bank.kept=0.4", "budget.over=model", "layer=[3,9,15]", "family=both", SHORT))
    found = spread(config, tmp_path / "a.json")
    assert not found.measured
    assert found.used <= 0.4
    assert sum(one.loss for one in found.shares) <= sum(one.uniform_loss for one in found.shares)

    def forbidden(*arguments: object, **options: object) -> object:
        raise AssertionError("what is known is not made again")

    monkeypatch.setattr(globe.sizes.sizing, "read_experts", forbidden)
    assert spread(config, tmp_path / "a.json") == found
    other = to_config(composed("bank.kept=0.41", "budget.over=model", "layer=[3,9,15]", "family=both", SHORT))
    with pytest.raises(AssertionError, match="not made again"):
        spread(other, tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(AssertionError, match="not made again"):
        spread(config, tmp_path / "a.json")


def test_what_the_model_feels_is_measured_on_text(tmp_path: Path) -> None:
    words = [
        "bank.kept=0.3",
        "budget.over=model",
        "layer=[3,12]",
        "family=both",
        "calibrate.text=embedded",
        SHORT,
    ]
    config = to_config(composed(*words, "calibrate.tokens=512", "calibrate.window=128"))
    found = spread(config, tmp_path / "a.json")
    assert found.measured
    kls = [one.sensitivity for one in found.shares]
    assert all(0 < kl < 1 for kl in kls)
    assert len(set(kls)) == 4
    assert found.used <= 0.3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["budget.over=model"], r"budget\.over='model' is not possible: give bank\.kept"),
        (["budget.over=model", "bank.kept=0.5", "bank.scope=layers"], r"family with budget\.over=model"),
    ],
)
def test_what_is_not_possible(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        to_config(composed(*words))


def test_experts_without_a_model_feel_nothing(tmp_path: Path) -> None:
    config = to_config(composed("bank.kept=0.5", "budget.over=model", "layer=all", "calibrate.text=embedded"))
    source = ExpertsInMemory({(0, "up"): experts(), (1, "up"): experts(seed=1)}, model_type="tensors")
    with pytest.raises(ConfigError, match=r"leave out calibrate\.text"):
        spread_budget(
            config, outline(config, source), Sizing(source, torch.device("cpu")), tmp_path / "a.json"
        )


def test_what_short_fits_leave_less_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank whose atoms make up for few numbers gives its own to another one."""
    config = to_config(composed("bank.kept=0.5", "budget.over=model", "layer=[3,4]", "family=up", SHORT))
    plain: dict[str, float] = {}
    for number, ratios in enumerate(((1.0, 1.0), (1.0, 0.01))):
        gains = iter([Gain((0.5,), (ratio,)) for ratio in ratios])
        monkeypatch.setattr(globe.sizes.whole_budget, "measure_gain", lambda *given: next(gains))  # noqa: B023
        found = spread(config, tmp_path / f"{number}.json")
        shares = {one.key: one.kept for one in found.shares}
        plain = plain or shares
    assert shares["layer004.up"] < plain["layer004.up"]
    assert shares["layer003.up"] > plain["layer003.up"]


# --- runs -------------------------------------------------------------------------------------------------------------

QUICK = ("budget.seconds=0.2", "train.steps=2", "export_dtype=float32")


def test_a_run_keeps_to_the_budget_and_leaves_the_rest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(globe.sizes.whole_budget, "sensitivities", felt([(3, "up")]))
    words = [
        "bank.kept=0.6",
        "budget.over=model",
        "layer=3-4",
        "family=both",
        "calibrate.text=embedded",
        *QUICK,
    ]
    figure, folder = run_in(tmp_path, *words)
    assert 0 < figure < 1
    printed = capsys.readouterr().out
    assert "one budget of 60.0% over 4 banks" in printed
    assert "instead of" in printed
    assert f"{folder}/allocation.png shows the shares" in printed
    assert (folder / "allocation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    plan = load(folder / "allocation.json")
    shares = {one["key"]: one["kept"] for one in plan["shares"]}
    banks = {one["key"]: one for one in load(folder / "summary.json")["banks"]}
    assert set(banks) == {key for key, share in shares.items() if share < 1}
    numbers = EMBEDDED.n * EMBEDDED.p * EMBEDDED.d
    for key, bank in banks.items():
        assert bank["kept_parameters"] <= shares[key] * numbers
        assert bank["kept_parameters"] > 0.8 * shares[key] * numbers
    total = sum(bank["kept_parameters"] for bank in banks.values()) + (4 - len(banks)) * numbers
    assert total <= 0.6 * 4 * numbers
    assert shares["layer003.up"] == max(shares.values()) > min(shares.values())
    again, _ = run_in(tmp_path, *words)
    assert again == figure


def test_a_dry_run_shows_the_plan_before_the_time_is_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in(tmp_path, "dry_run=true", "bank.kept=0.5", "budget.over=model", "layer=3-4", "family=both", *QUICK)
    printed = capsys.readouterr().out
    assert "one budget of 50.0% over 4 banks" in printed
    assert "####" in printed
    assert "4 banks: " in printed
    assert not list(tmp_path.iterdir())


def test_it_is_planned_in_the_metric_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The statistics that a dry run takes are those that the run then finds."""
    monkeypatch.chdir(tmp_path)
    words = [
        "bank.kept=0.5",
        "budget.over=model",
        "layer=3-4",
        "family=up",
        *QUICK,
        "normalise.metric=inputs",
    ]
    words += ["calibrate.text=embedded", "calibrate.tokens=512", "calibrate.window=128"]
    run_in(tmp_path / "runs", "dry_run=true", *words)
    planned = capsys.readouterr().out
    _, folder = run_in(tmp_path / "runs", *words)
    made = load(folder / "allocation.json")
    assert made["measured"]
    for one in made["shares"]:
        assert f"{one['sensitivity']:.3g}" in planned
        assert one["kept"] == 1 or f"{one['kept']:.1%}" in planned


@pytest.mark.parametrize("method", ["svd", "shared_basis"])
def test_other_methods_take_their_share_of_it(tmp_path: Path, method: str) -> None:
    words = ["bank.kept=0.5", "budget.over=model", "layer=3-5", f"method={method}", "export_dtype=float32"]
    _, folder = run_in(tmp_path, *words)
    shares = {
        one["key"]: one["kept"] for one in json.loads((folder / "allocation.json").read_text())["shares"]
    }
    for bank in load(folder / "summary.json")["banks"]:
        assert bank["kept_parameters"] <= shares[bank["key"]] * bank["parameters"] + 1


def test_from_python(tmp_path: Path) -> None:
    words = ["budget.over=model", "budget.seconds=0.2"]
    model = globe.compress(
        "embedded", kept=0.7, layers=[3, 12], steps=2, folder=tmp_path / "run", overrides=words
    )
    assert (tmp_path / "run" / "allocation.json").is_file()
    original = globe.load("embedded")
    saved = original.num_parameters() - model.num_parameters()
    assert saved >= 0.3 * 4 * EMBEDDED.n * EMBEDDED.p * EMBEDDED.d * 0.99
