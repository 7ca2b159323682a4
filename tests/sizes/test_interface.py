"""`globe.fit`: the same numbers as the command, from tensors, with the same sentences for what can't be."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import globe
from globe.bank.file import read_artefact
from globe.errors import ArtefactError, CheckpointError, ConfigError, GlobeError
from run_support import run_in

N, P, D, M, R = 7, 11, 13, 3, 5
ROOT = Path(__file__).parents[2]


def planted(*, n: int = N, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Experts that a linear bank of these sizes reproduces: A_i sum_j alpha_ij B_j."""
    draw = torch.Generator().manual_seed(seed)
    atoms = torch.randn(M, R, D, generator=draw, dtype=torch.float64)
    codes = torch.rand(n, M, generator=draw, dtype=torch.float64) + 0.1
    adapters = torch.randn(n, P, R, generator=draw, dtype=torch.float64)
    return (adapters @ (codes @ atoms.flatten(1)).view(n, R, D)).to(dtype)


def exact(experts: Any, **more: Any) -> Any:
    """A fit that can reach zero error on planted experts."""
    words = ["normalise.centre=none", "train.lambda_A=0", "train.patience=0", *more.pop("overrides", ())]
    return globe.fit(
        experts, m=M, r=R, activation="identity", steps=80, dtype=torch.float64, overrides=words, **more
    )


def test_planted_experts_are_found_again_in_their_units() -> None:
    W = 40 * planted()
    before = W.clone()
    bank = exact(W)
    assert torch.equal(W, before)
    assert bank.relfrob < 1e-3
    assert (bank.reconstruct() - W).norm() < 1e-3 * W.norm()
    torch.testing.assert_close(bank.reconstruct([5, 2]), bank.reconstruct()[[5, 2]], rtol=1e-12, atol=1e-10)
    assert bank.reconstruct([], dtype=torch.float32).shape == (0, P, D)
    kept = (N * P * R + M * R * D + N * M) / (N * P * D)
    assert bank.kept == pytest.approx(kept, rel=1e-12)
    assert (bank.sizes.n, bank.sizes.p, bank.sizes.d, bank.sizes.m, bank.sizes.r) == (N, P, D, M, R)
    assert bank.sizes.atom_rank is None


def test_relfrob_is_the_error_of_what_is_reconstructed() -> None:
    W = torch.randn(N, P, D, generator=torch.Generator().manual_seed(4)) + 0.3
    bank = globe.fit(W, m=M, r=R, steps=4)
    error = (bank.reconstruct().double() - W.double()).norm() / (W.double() - W.double().mean()).norm()
    assert bank.relfrob == pytest.approx(float(error), rel=1e-5)


def test_a_list_of_matrices_is_the_tensor_of_them() -> None:
    W = planted(dtype=torch.float32)
    one, other = (globe.fit(each, m=M, r=R, steps=3) for each in (W, list(W)))
    assert torch.equal(one.reconstruct(), other.reconstruct())


def test_groups_share_a_bank_and_are_normalised_by_themselves() -> None:
    small, large = planted(n=4, seed=1), planted(n=N, seed=1) * 1000
    bank = exact([small, large], overrides=["init.seeding=group_svd"])
    assert bank.sizes.n == 4 + N
    assert [(one.start, one.stop) for one in bank.artefact.members] == [(0, 4), (4, 4 + N)]
    # jointly normalised, the small group would be 1e-6 of the objective
    assert (bank.reconstruct(range(4)) - small).norm() < 0.02 * small.norm()


def test_the_bytes_are_those_of_the_command(tmp_path: Path) -> None:
    words = ["model.max_experts=8", "layer=0", "bank.m=3", "bank.r=11", "train.steps=6", "seed=5"]
    _, folder = run_in(tmp_path, *words)
    experts = globe.extract_expert_weights("embedded", single_layer=0, max_experts=8)["up"]
    bank = globe.fit(experts, m=3, r=11, steps=6, seed=5)
    command = read_artefact(folder / "banks" / "layer000.up")
    for name, tensor in command.tensors().items():
        assert torch.equal(tensor, bank.artefact.tensors()[name]), name
    assert bank.relfrob == command.metrics["relfrob"]


def test_a_budget_chooses_sizes_within_it_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bank = globe.fit(planted(dtype=torch.float32), kept=0.7, steps=12, overrides=["budget.seconds=0.5"])
    assert 0.4 < bank.kept <= 0.7
    assert capsys.readouterr().out == ""
    globe.fit(
        planted(dtype=torch.float32), kept=0.7, steps=12, overrides=["budget.seconds=0.5"], progress=True
    )
    assert "sizes within" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["svd", "shared_basis", "mean_svd", "group_svd"])
def test_methods_it_is_measured_against(method: str) -> None:
    bank = globe.fit(planted(dtype=torch.float32), kept=0.6, method=method)
    assert bank.kept <= 0.6
    assert 0 < bank.relfrob < 1


def test_options_reach_the_fit() -> None:
    W = planted(dtype=torch.float32)
    bank = globe.fit(W, m=4, r=6, k=2, support=2, steps=10, export_dtype=torch.bfloat16)
    assert bank.sizes.atom_rank == 2
    assert bank.sizes.target_support == 2
    assert float((bank.artefact.codes > 0).sum(dim=1).double().median()) <= 2
    assert bank.artefact.codes.dtype == torch.bfloat16
    assert bank.reconstruct([0], dtype=torch.float64).dtype == torch.float64


def test_save_and_load(tmp_path: Path) -> None:
    bank = globe.fit(planted(dtype=torch.float32), m=M, r=R, steps=3)
    bank.save(tmp_path / "bank")
    again = globe.load_bank(tmp_path / "bank")
    assert torch.equal(again.reconstruct(), bank.reconstruct())
    assert (again.relfrob, again.kept, again.sizes) == (bank.relfrob, bank.kept, bank.sizes)
    assert repr(again) == repr(bank)
    with pytest.raises(ArtefactError, match="can't be read"):
        globe.load_bank(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kept": 2.0}, r"bank\.kept=2\.0 is not possible"),
        ({"kept": 0.5, "m": 3}, r"leave out bank\.m"),
        ({"m": 99}, r"bank\.m=99 is more than the 7 experts"),
        ({"m": 3, "r": "q/2"}, r"bank\.r='q/2'"),
        ({"metric": "nearest"}, r"normalise\.metric='nearest' is not possible: give one of "),
        ({"overrides": ["train.steps=many"]}, r"train\.steps=many is not possible: give an integer"),
        ({"steps": 0}, r"train\.steps=0 is not possible"),
        ({"seed": -1}, r"seed=-1 is not possible"),
        ({"method": "svdd"}, r"method=svdd is not possible: give one of"),
        ({"device": "tpu"}, r"device='tpu' is not possible"),
        ({"overrides": ["bank.q=1"]}, r"bank\.q is not an option"),
        ({"overrides": ["bank.scope=layers"]}, r"bank\.scope=layers is for models"),
        ({"stepz": 3}, r"stepz is not an argument: give one of kept, m, r, k"),
    ],
)
def test_what_is_not_possible_is_said_as_by_the_command(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        globe.fit(planted(), **arguments)


def test_an_expert_that_is_not_there_cannot_be_reconstructed() -> None:
    bank = globe.fit(planted(), m=M, r=R, steps=1)
    for wrong in ([N], [0, -1]):
        with pytest.raises(ConfigError, match="give numbers from 0 to 6"):
            bank.reconstruct(wrong)


def test_experts_that_are_none() -> None:
    W = planted()
    broken = W.clone()
    broken[3, 2, 1] = torch.nan
    for experts, sentence in [
        (W[0], r"shape \(11, 13\)"),
        (W[:0], r"shape \(0, 11, 13\)"),
        (W.int(), "dtype torch.int32"),
        (broken, "expert 3 of layer 0 up holds NaN"),
        ([], "at least one tensor"),
        ([W[0], W[1, :5]], "can't share a bank"),
        ([W[0], W[1].float()], "different dtypes"),
    ]:
        with pytest.raises(CheckpointError, match=sentence):
            globe.fit(experts, m=2, r=R, steps=1)


def test_the_package_says_its_version_and_its_names_without_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert globe.__version__ == project["version"]
    code = (
        "import sys, globe; assert callable(globe.fit); print('torch' in sys.modules, sorted(globe.__all__))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith(
        "False ['Bank', 'compress', 'extract_expert_weights', 'fit', 'load', 'load_bank'"
    )
    for name in globe.__all__:
        assert callable(getattr(globe, name))
    assert issubclass(GlobeError, ValueError)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = globe.fitt  # type: ignore[attr-defined]
