"""What the tests of evaluation share: a tiny checkpoint with a byte-level tokenizer, a text, and runs on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_support import TEXT, VOCABULARY, write_tokenizer

from globe.checkpoint import open_checkpoint
from tiny_models import write_tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))  # made_runs: banks made by hand


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    import transformers

    from globe.hf.register import install

    install()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Model type -> folder of a tiny checkpoint with a tokenizer, written once; not to be changed."""
    made: dict[str, Path] = {}

    def folder(model_type: str = "qwen2_moe", **overrides: Any) -> Path:
        key = model_type + json.dumps(overrides)
        if key not in made:
            path = tmp_path_factory.mktemp("checkpoints") / model_type
            made[key] = write_tiny(model_type, path, **({"vocab_size": VOCABULARY} | overrides))
            write_tokenizer(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model(checkpoint_of: Callable[..., Path]) -> Any:
    """The tiny model; not to be changed."""
    from globe.hf import load

    return load(checkpoint_of())


@pytest.fixture(scope="session")
def other(checkpoint_of: Callable[..., Path]) -> Any:
    """The same with slightly other weights; not to be changed."""
    from globe.hf import load

    changed = load(checkpoint_of())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return changed


@pytest.fixture(scope="session")
def lossless_run(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose banks give back every gate and up matrix exactly."""
    from made_runs import lossless_bank, write_run

    checkpoint = open_checkpoint(str(checkpoint_of()))
    places = [(layer, family) for layer in checkpoint.moe_layers for family in ("gate", "up")]
    banks = [lossless_bank(checkpoint, place) for place in places]
    return write_run(tmp_path_factory.mktemp("lossless") / "run", banks)


@pytest.fixture(scope="session")
def lossy_run(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random banks with matrix means for up of layer 0 and gate of layer 1."""
    from made_runs import random_bank, write_run

    checkpoint = open_checkpoint(str(checkpoint_of()))
    banks = [random_bank(checkpoint, [place], mean="matrix", seed=7) for place in ((0, "up"), (1, "gate"))]
    return write_run(tmp_path_factory.mktemp("lossy") / "run", banks)
