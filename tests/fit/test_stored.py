"""Experts that stay in the checkpoint's dtype give the bits of normalised ones, however they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from globe.config.composition import plain, to_config
from globe.config.identity import run_name
from globe.errors import CheckpointError, ConfigError
from globe.fit.input_metric import second_moment_metric
from globe.fit.normalise import join, normalise
from globe.fit.stored_experts import StoredExperts
from globe.numerics.figures import spread, squared_norms
from run_support import bytes_of, composed, run_in, small_checkpoint

N, P, D = 5, 4, 6


def weights(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.3 + torch.randn(N, P, D, generator=generator)).bfloat16()


def both(centre: str = "scalar", scale: str = "family", members: int = 1) -> tuple[Tensor, Tensor]:
    """Normalised experts of one or more members, as a tensor and stored."""
    parts = [weights(seed) for seed in range(members)]
    plain, stored = (
        join([normalise(W, centre=centre, scale=scale, store=store) for W in parts])
        for store in (False, True)
    )
    assert isinstance(stored.experts, StoredExperts)
    for one, other in zip((plain.mean, plain.scale), (stored.mean, stored.scale), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    return plain.experts, stored.experts


READINGS = {
    "one": lambda X: X[2],
    "last": lambda X: X[-1],
    "some": lambda X: X[1:4],
    "every second": lambda X: X[::2],
    "all": lambda X: X[:],
    "all but in name": lambda X: X[0 : len(X)],
    "none": lambda X: X[3:3],
    "listed": lambda X: X[[3, 0, 3]],
    "by a tensor": lambda X: X[torch.tensor([4, 1])],
    "by a mask": lambda X: X[torch.tensor([True, False] * (len(X) // 2) + [True] * (len(X) % 2))],
    "one row": lambda X: X[1, 2],
    "one by one": lambda X: torch.stack(list(X)),
    "a product": lambda X: X @ X.mT,
    "flat": lambda X: X.flatten(1),
    "in float64": lambda X: X.double(),
    "its norms": squared_norms,
    "its spread": lambda X: spread(X).squares,
    "its second moment": lambda X: second_moment_metric(X).columns.roots,
}


@pytest.mark.parametrize("how", READINGS)
@pytest.mark.parametrize("members", [1, 2])
def test_every_reading_gives_the_bits_of_a_tensor(how: str, members: int) -> None:
    wanted, stored = both(members=members)
    read = READINGS[how](stored)
    assert type(read) is Tensor
    assert torch.equal(read, READINGS[how](wanted))


@pytest.mark.parametrize("centre", ["none", "scalar", "expert_mean"])
@pytest.mark.parametrize("scale", ["none", "family", "expert", "row"])
@pytest.mark.parametrize("members", [1, 3])
def test_all_normalisations_are_undone_alike(centre: str, scale: str, members: int) -> None:
    wanted, stored = both(centre, scale, members)
    assert stored.shape == wanted.shape == (members * N, P, D)
    assert stored.dtype == wanted.dtype == torch.float32
    assert isinstance(stored, StoredExperts)
    assert torch.equal(stored.dense(), wanted)


def test_the_weights_are_not_copied() -> None:
    W = weights()
    stored = normalise(W, centre="scalar", scale="family", dtype=torch.float64, store=True).experts
    assert isinstance(stored, StoredExperts)
    assert stored.weights.data_ptr() == W.data_ptr()
    assert "bfloat16" in repr(stored)
    assert stored.dtype == torch.float64


def test_new_tensors_like_it_are_ordinary() -> None:
    _, stored = both()
    for made in (stored.new_empty(2, 3), stored.new_zeros((2, 3)), torch.zeros_like(stored)):
        assert type(made) is Tensor
        assert made.dtype == torch.float32
    assert stored.new_empty((2,), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert stored.new_zeros(2, 3).shape == (2, 3)
    assert torch.ones(2, dtype=torch.float64).to(stored).dtype == torch.float32


def test_writing_is_an_error() -> None:
    _, stored = both()
    with pytest.raises(TypeError, match="dense"):
        stored[0] = 1.0
    with pytest.raises(TypeError, match="dense"):
        stored.mul_(2)


RUNS = {
    "dense atoms": ["family=up"],
    "low-rank atoms": ["family=up", "bank.atom_rank=r/2", "codes.target_support=3"],
    "up and gate in one bank": ["family=both", "bank.scope=families", "normalise.scale=row"],
    "layers in one bank": [
        "family=gate",
        "layer=[11,12]",
        "bank.scope=layers",
        "normalise.centre=expert_mean",
    ],
    "classical": ["family=up", "train.dictionary=mod", "schedule.beta.start=0.5", "init.codes=nnls"],
    "with a search": ["family=up", "bank.kept=0.5", "budget.seconds=1"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in bfloat16."""
    folder = small_checkpoint(tmp_path_factory.mktemp("stored") / "model")
    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_runs_end_with_the_same_bytes(checkpoint: Path, tmp_path: Path, name: str) -> None:
    options = ["layer=12", "train.steps=4", f"model.path={checkpoint}", "device=cpu", *RUNS[name]]
    banks = []
    for store in ("fit", "checkpoint"):
        _, folder = run_in(tmp_path / store, *options, f"normalise.store={store}")
        keys = sorted(path.name for path in (folder / "banks").iterdir() if path.is_dir())
        banks.append({key: bytes_of(folder, key) for key in keys})
    assert banks[0]
    assert banks[0] == banks[1]


def test_where_experts_are_held_is_not_part_of_a_runs_name() -> None:
    names = {run_name(plain(composed(f"normalise.store={store}"))) for store in ("fit", "checkpoint")}
    assert len(names) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["method=svd"],
        ["method=mobe", "train.steps=5"],
        ["normalise.metric=experts", "bank.activation=identity"],
    ],
)
def test_what_writes_to_the_experts_is_refused(options: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"normalise\.store='checkpoint' .*: give fit, or method=globe"):
        to_config(composed("normalise.store=checkpoint", *options))


def test_a_weight_that_is_not_finite_is_found_at_once() -> None:
    W = weights()
    W[3, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="expert 3"):
        normalise(W, centre="scalar", scale="family", store=True)
