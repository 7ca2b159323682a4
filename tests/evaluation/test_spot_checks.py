"""Spot checks of experts: spectra and angles that are known, and a parity that notices what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import dense_experts, random_bank, write_run
from torch import Tensor

from globe.calibration.experts_module import experts_modules
from globe.checkpoint import open_checkpoint
from globe.evaluation.spot_checks import (
    Pair,
    Place,
    SpotCheck,
    compare,
    draw_places,
    rebuilt_matrix,
    spot_checks,
    stored_matrix,
    tolerance,
)
from globe.evaluation.subject import open_subject
from globe.patch import parse, patch

CPU = torch.device("cpu")
HERE = Place(3, "up", 5)
P, D = 12, 17


def orthonormal(size: int, count: int, seed: int) -> Tensor:
    draw = torch.randn(size, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw).Q


def matrix(values: list[float], left: Tensor, right: Tensor) -> Tensor:
    return (
        left[:, : len(values)]
        @ torch.diag(torch.tensor(values, dtype=torch.float64))
        @ right[:, : len(values)].T
    )


def look(W: Tensor, rebuilt: Tensor, top_k: int = 2) -> SpotCheck:
    return compare(HERE, W, rebuilt, top_k=top_k, parity=None)


def test_a_truncated_matrix_keeps_its_leading_subspaces() -> None:
    left, right = orthonormal(P, 4, 0), orthonormal(D, 4, 1)
    found = look(matrix([6, 3, 2, 1], left, right), matrix([6, 3], left, right))
    assert (found.layer, found.family, found.expert) == HERE
    assert found.relfrob == pytest.approx(math.sqrt(5 / 50))
    assert found.spectrum == pytest.approx(math.sqrt(5 / 50))
    assert found.effective_rank == (3, 2)
    assert found.alignment_left == pytest.approx(1)
    assert found.alignment_right == pytest.approx(1)


def test_a_turned_matrix_keeps_its_spectrum() -> None:
    """One of two leading right directions turned by 30 degrees out of their plane: (1 + cos^2 30) / 2."""
    left, right = orthonormal(P, 2, 0), orthonormal(D, 3, 1)
    angle = math.radians(30)
    turned = torch.stack([right[:, 0], math.cos(angle) * right[:, 1] + math.sin(angle) * right[:, 2]], dim=1)
    found = look(matrix([6, 3], left, right), matrix([6, 3], left, turned))
    assert found.spectrum == pytest.approx(0, abs=1e-12)
    assert found.relfrob > 0.1
    assert found.alignment_left == pytest.approx(1)
    assert found.alignment_right == pytest.approx((1 + 0.75) / 2)


def test_more_directions_than_there_are_is_all_of_them() -> None:
    W = torch.randn(P, D, generator=torch.Generator().manual_seed(0))
    found = look(W, W, top_k=50)
    assert (found.relfrob, found.spectrum) == (0.0, 0.0)
    assert found.alignment_left == pytest.approx(1)


def pair_of(model: str, against: str) -> Pair:
    subject, original = open_subject(model, against)
    assert original is not None
    assert original.checkpoint is not None
    loaded = subject.load(dtype=torch.float32, device=CPU, S_cache=None)
    dense = original.load(dtype=torch.float32, device=CPU, S_cache=None)
    return Pair(subject, loaded, original.checkpoint, dense)


@pytest.fixture(scope="module")
def patched(
    checkpoint_of: Callable[..., Path], lossy_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The run, and both checkpoints made from it."""
    folder = tmp_path_factory.mktemp("patched")
    for form in ("dense", "globe"):
        patch(parse([f"run={lossy_run}", f"out={folder / form}", f"format={form}"]))
    return {"run": lossy_run, "dense": folder / "dense", "globe": folder / "globe"}


@pytest.mark.parametrize("form", ["run", "dense", "globe"])
def test_the_rebuilt_matrices_are_those_of_the_banks(
    form: str, patched: dict[str, Path], checkpoint_of: Callable[..., Path]
) -> None:
    """The same seven places in all three forms, the matrices as an independent sum has them."""
    checkpoint = open_checkpoint(str(checkpoint_of()))
    expected = {}
    for place in ((0, "up"), (1, "gate")):
        expected |= dense_experts(random_bank(checkpoint, [place], mean="matrix", seed=7))
    pair = pair_of(str(patched[form]), "auto")
    places = draw_places(pair, 7, seed=2)
    assert len(places) == 7
    assert {place[:2] for place in places} == {(0, "up"), (1, "gate")}
    for place in places:
        torch.testing.assert_close(rebuilt_matrix(pair, place), expected[place], rtol=1e-5, atol=1e-6)
    found = spot_checks(pair, places, top_k=3, seed=0)
    for check, place in zip(found, places, strict=True):
        W = stored_matrix(checkpoint, place)
        error = float((W - expected[place]).norm() / W.norm())
        assert check.relfrob == pytest.approx(error, rel=1e-4)
        assert check.parity is not None
        assert check.parity < tolerance(torch.float32) / 10


@pytest.mark.parametrize("form", ["run", "dense", "globe"])
def test_parity_notices_a_model_that_computes_something_else(form: str, patched: dict[str, Path]) -> None:
    pair = pair_of(str(patched[form]), "auto")
    places = [Place(0, "up", 2)]
    module: Any = pair.model.get_submodule(experts_modules(pair.model)[0])
    with torch.no_grad():
        match form:
            case "dense":
                module.gate_up_proj[2] = module.gate_up_proj[1]
            case "run":  # other factors than those of the bank
                module.globe_up.adapters[2] *= 1.01
            case _:  # the right factors, multiplied wrongly
                module.globe_up.register_forward_hook(lambda module, args, output: 1.01 * output)
    (found,) = spot_checks(pair, places, top_k=3, seed=0)
    assert found.parity is not None
    assert found.parity > tolerance(torch.float32)


def test_experts_are_drawn_by_seed_and_never_twice(patched: dict[str, Path]) -> None:
    pair = pair_of(str(patched["dense"]), "auto")
    everything = draw_places(pair, 1000, seed=0)
    assert len(set(everything)) == len(everything) == 12
    assert draw_places(pair, 5, seed=1) == draw_places(pair, 5, seed=1) != draw_places(pair, 5, seed=2)


def test_two_checkpoints_without_a_record_are_compared_everywhere(checkpoint_of: Callable[..., Path]) -> None:
    folder = str(checkpoint_of())
    pair = pair_of(folder, folder)
    places = draw_places(pair, 1000, seed=0)
    assert {place[:2] for place in places} == {
        (layer, family) for layer in (0, 1) for family in ("gate", "up")
    }
    for check in spot_checks(pair, places[:3], top_k=2, seed=0):
        assert (check.relfrob, check.spectrum) == (0.0, 0.0)
        assert check.parity is not None
        assert check.parity < 1e-5


@pytest.mark.parametrize(("model_type", "families"), [("gpt_oss", {"gate", "up"}), ("nemotron_h", {"up"})])
def test_experts_of_another_form_have_no_parity(
    model_type: str, families: set[str], checkpoint_of: Callable[..., Path]
) -> None:
    folder = str(checkpoint_of(model_type))
    pair = pair_of(folder, folder)
    places = draw_places(pair, 30, seed=0)
    assert {place.family for place in places} == families
    (check,) = spot_checks(pair, places[:1], top_k=2, seed=0)
    assert check.parity is None
    assert check.relfrob == 0


def test_low_rank_atoms_and_experts_left_out(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """Only experts 1 and 4 have a bank: they alone are drawn, and the factors give what the bank stands for."""
    checkpoint = open_checkpoint(str(checkpoint_of()))
    bank = random_bank(checkpoint, [(1, "up")], experts=(1, 4), low_rank=True, mean="scalar", seed=3)
    run = write_run(tmp_path / "run", [bank])
    patch(parse([f"run={run}", f"out={tmp_path / 'globe'}", "format=globe"]))
    expected = dense_experts(bank)
    for form in (run, tmp_path / "globe"):
        pair = pair_of(str(form), "auto")
        places = draw_places(pair, 9, seed=0)
        assert places == [Place(1, "up", 1), Place(1, "up", 4)]
        for place in places:
            torch.testing.assert_close(rebuilt_matrix(pair, place), expected[place], rtol=1e-5, atol=1e-6)
        left_out = rebuilt_matrix(pair, Place(1, "up", 3))
        assert torch.equal(left_out, stored_matrix(checkpoint, Place(1, "up", 3)))
        assert all(
            check.parity is not None and check.parity < 1e-5
            for check in spot_checks(pair, places, top_k=2, seed=0)
        )


def test_tolerances_by_dtype() -> None:
    wide, usual, narrow = (tolerance(one) for one in (torch.float64, torch.float32, torch.bfloat16))
    assert 0 < wide < usual < narrow < 0.1
    assert tolerance(torch.float16) == narrow


def test_models_without_a_twin_are_seen_as_such(model: Any, checkpoint_of: Callable[..., Path]) -> None:
    from globe.evaluation.subject import same_skeleton
    from globe.hf import load

    assert same_skeleton(model, model)
    assert not same_skeleton(model, load(checkpoint_of("olmoe")))
