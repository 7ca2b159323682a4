"""A fit cut off after any step and continued from the state on disk gives the same bits as one left alone."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import configured, fitted, plant, sizes_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.records import Factors, FitResult, FitState
from globe.am.running import require_fitting
from globe.config.choices import CodeMap, Curve, Dictionary, FirstCodes, Seeding
from globe.config.fit_options import CurveConfig
from globe.config.schema import InitConfig
from globe.fit.options import fit_options

HOMOTOPY = {"lam": CurveConfig(Curve.cosine, 0.0, 1.0, warmup=0.1, hold=0.3)}
WARM = {"beta": CurveConfig(Curve.linear, 0.0, 1.0, hold=0.5)}
COOLING = {"temperature": CurveConfig(Curve.exponential, 1.0, 0.5)}
DENSE = InitConfig()

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear, with the ridge of its start": ({"lambda_A": 1.0}, {}),
    "silu homotopy": ({"activation": "silu", "schedule": HOMOTOPY}, {}),
    "low rank": ({"init": DENSE}, {"atom_rank": 2}),
    "low rank, gelu, sparse": (
        {"init": DENSE, "activation": "gelu", "lam": 1.0},
        {"atom_rank": 2, "target_support": 2},
    ),
    "mod": ({"dictionary": Dictionary.mod}, {}),
    "mod, blended, ridged": (
        {
            "dictionary": Dictionary.mod,
            "schedule": WARM,
            "lambda_T": 1e-3,
            "lambda_B": 1e-3,
            "lambda_A": 1e-4,
        },
        {},
    ),
    "blended": ({"schedule": WARM, "activation": "tanh", "lam": 0.5}, {}),
    "sparse": ({"codes": {"every": 2, "control_every": 1}, "schedule": COOLING}, {"target_support": 1}),
    "sparse, sparsemax": (
        {"codes": {"map": CodeMap.sparsemax, "eta": 0.5, "control_every": 2}},
        {"target_support": 2},
    ),
    "simplex": ({"codes": {"simplex": True}}, {"target_support": 2}),
    "coding alone moves the codes": ({"codes": {"joint": False, "every": 1}}, {}),
    "codes held": ({"codes": {"joint": False, "every": 0}, "init": InitConfig(codes=FirstCodes.simplex)}, {}),
    "l1": ({"codes": {"l1": 0.05, "every": 3}}, {}),
    "k-means": ({"init": InitConfig(seeding=Seeding.kmeans), "momentum": 0.5}, {}),
}


def through_disk(state: FitState, folder: Path) -> FitState:
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.tensors.items()},
        folder / "state.safetensors",
    )
    (folder / "state.json").write_text(json.dumps(state.numbers))
    return FitState(load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text()))


def assert_same(found: FitResult, wanted: FitResult) -> None:
    for name, one, other in zip(Factors._fields, found.factors, wanted.factors, strict=True):
        assert (one is None) == (other is None), name
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other), name
    for field in fields(FitResult):
        if field.name not in ("factors", "seconds"):
            assert getattr(found, field.name) == getattr(wanted, field.name), field.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options, more = CASES[name]
    X = plant(noise=0.2, dtype=dtype).X
    sizes = sizes_of(X, **more)
    config = configured(
        **({"steps": 7, "cg_iterations": 4, "evaluate_every": 2, "checkpoint_every": 0.0} | options)
    )
    states: list[FitState] = []
    # a copy at once, as a file is: later steps must not reach into what was handed out
    wanted, records = fitted(
        X,
        sizes,
        config,
        export_dtype=torch.bfloat16,
        on_checkpoint=lambda state: states.append(through_disk(state, tmp_path)),
    )
    assert [state.numbers["step"] for state in states] == list(range(1, 7))
    for state in states if dtype == torch.float32 else states[1::2]:
        require_fitting(state, sizes)
        later: list[Any] = []
        # another generator: a resumed fit draws nothing from it
        found = fit_bank(
            X,
            sizes,
            fit_options(config, export_dtype=torch.bfloat16),
            generator=torch.Generator().manual_seed(99),
            resume=state,
            on_step=later.append,
        )
        assert_same(found, wanted)
        step = state.numbers["step"]
        assert isinstance(step, int)
        for one, other in zip(later, records[step:], strict=True):
            plain, expected = one.flat(), other.flat()
            for key in plain:
                assert key.startswith("seconds") or plain[key] == expected[key], key


def test_the_best_state_survives_a_resume(tmp_path: Path) -> None:
    """MOD ascends: the result is the best state, also when the fit is cut off after it."""
    X = plant(noise=0.4, seed=1).X
    config = configured(dictionary=Dictionary.mod, steps=12, checkpoint_every=0.0)
    states: list[FitState] = []
    wanted, records = fitted(X, sizes_of(X), config, on_checkpoint=states.append)
    objectives = [record.objective for record in records]
    ascended = [step for step in range(1, 12) if objectives[step] > min(objectives[:step])]
    assert ascended, "MOD did not ascend here: the case shows nothing"
    assert wanted.relfrob == pytest.approx(min(record.relfrob for record in records), rel=1e-12)
    assert any("best.bank" in state.tensors for state in states)
    found, _ = fitted(X, sizes_of(X), config, resume=through_disk(states[-1], tmp_path))
    assert_same(found, wanted)


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("tensors", "now.codes", None),
        ("tensors", "now.codes", torch.ones(17, 1)),
        ("tensors", "now.bank", torch.full((3, 4, 14), float("nan"))),
        ("tensors", "anchor.bank", torch.ones(3, 4, 14, dtype=torch.int64)),
        ("tensors", "seen", torch.ones(2, 2)),
        ("numbers", "step", "3"),
        ("numbers", "step", -1),
        ("numbers", "step", True),
        ("numbers", "seconds", float("inf")),
        ("numbers", "state.damping", None),
        ("numbers", "frozen", 1),
        ("numbers", "seed", None),
    ],
)
def test_a_state_that_a_fit_can_not_go_on_from_is_refused(where: str, name: str, value: Any) -> None:
    X, saved = plant().X, list[FitState]()
    sizes = sizes_of(X)
    fitted(X, sizes, configured(steps=3, checkpoint_every=0.0), on_checkpoint=saved.append)
    require_fitting(saved[-1], sizes)
    tensors, numbers = dict(saved[-1].tensors), dict(saved[-1].numbers)
    {"tensors": tensors, "numbers": numbers}[where][name] = value
    if value is None:
        del {"tensors": tensors, "numbers": numbers}[where][name]
    with pytest.raises(ValueError, match=r"^its (tensor|number) "):
        require_fitting(FitState(tensors, numbers), sizes)


def test_a_state_holds_plain_numbers_and_tensors_of_its_own() -> None:
    X = plant(noise=0.2).X
    states: list[FitState] = []
    fitted(X, sizes_of(X), configured(steps=3, checkpoint_every=0.0), on_checkpoint=states.append)
    for state in states:
        assert all(isinstance(value, float | int | bool | str | None) for value in state.numbers.values())
        assert all(type(tensor) is Tensor for tensor in state.tensors.values())
    assert not torch.equal(states[0].tensors["now.bank"], states[1].tensors["now.bank"])


def test_no_checkpoint_before_its_time_is_due() -> None:
    X = plant().X
    states: list[FitState] = []
    fitted(X, sizes_of(X), configured(steps=3, checkpoint_every=3600.0), on_checkpoint=states.append)
    assert states == []
