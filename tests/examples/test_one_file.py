"""`examples/globe_in_one_file.py`: short, on its own, and as good as the package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.records import Sizes
from globe.am.refit import refit
from globe.checkpoint import open_checkpoint
from globe.config.keywords import configure
from globe.fit.finalise import finalise
from globe.fit.normalise import normalise
from globe.fit.options import fit_options
from scripts import load_script

FILE = Path(__file__).parents[2] / "examples" / "globe_in_one_file.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    module = load_script(FILE, "globe_in_one_file")
    yield module
    del sys.modules["globe_in_one_file"]


def package(W: Tensor, m: int, r: int, steps: int, seed: int) -> float:
    """RelFrob of what the package exports after as many steps."""
    config = configure({"train.steps": steps, "train.patience": 0})
    normalised = normalise(W, centre="scalar", scale="family", dtype=torch.float32)
    sizes = Sizes(*W.shape, m=m, r=r)
    result = fit_bank(
        normalised.experts, sizes, fit_options(config), generator=torch.Generator().manual_seed(seed)
    )
    done = finalise(
        result.factors,
        normalised,
        lam=result.lam,
        activation="silu",
        export_dtype=torch.bfloat16,
        prune=config.codes.prune,
        refit=lambda X, M: refit(X, M, lambda_A=config.train.lambda_A).adapters,
    )
    return done.relfrob


def test_it_ends_within_half_a_percent_of_the_package(example: ModuleType) -> None:
    """Two ways of rounding end a little apart, so that it is the mean over layers and seeds that is compared."""
    differences = []
    for layer, family in ((12, "up"), (3, "gate")):
        W = open_checkpoint(None).read_experts(layer, family).weights
        for seed in range(3):
            _, relfrob = example.export(W, example.fit(W, 4, 22, 60, seed=seed))
            differences.append(relfrob / package(W, 4, 22, 60, seed=seed) - 1)
    assert abs(sum(differences) / len(differences)) < 5e-3
    assert max(map(abs, differences)) < 2e-2


def test_the_figure_is_that_of_what_is_stored(example: ModuleType) -> None:
    W = open_checkpoint(None).read_experts(7, "up").weights
    bank, relfrob = example.export(W, example.fit(W, 5, 17, 4))
    left = (W.double() - bank.rebuild().double()).norm() / (W.double() - W.double().mean()).norm()
    assert float(left) == pytest.approx(relfrob, rel=1e-3)
    assert bank.bank.shape == (5, 17, 64)
    assert {part.dtype for part in (bank.bank, bank.codes, bank.adapters)} == {torch.bfloat16}


def test_the_error_never_rises(example: ModuleType) -> None:
    W = torch.randn(7, 11, 13, generator=torch.Generator().manual_seed(0))
    errors = [example.fit(W, 3, 5, steps).error for steps in range(8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_it_can_be_read_in_one_go() -> None:
    text = FILE.read_text()
    assert len(text.splitlines()) <= 300
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [one.name for one in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"__future__", "numpy", "pathlib", "safetensors", "sys", "torch", "typing"}


def test_it_runs_as_a_program(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        example.main(0, "gate")
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "step  60   RelFrob 0." in printed
    assert "experts of the shape (16, 48, 64): 50.1% of the numbers kept" in printed
