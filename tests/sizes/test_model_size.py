"""`model.size`: the files of the whole compressed model, never above what is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from globe.bank.file import read_artefact
from globe.checkpoint import open_checkpoint
from globe.config.bank_options import bytes_of_text
from globe.config.composition import to_config
from globe.errors import ConfigError
from globe.fit.bank_records import figures_of_bytes
from globe.fit.plan import outline
from globe.patch import parse, patch
from globe.sizes.dry_run import predict, totals
from globe.sizes.model_size import with_model_size
from run_support import composed, run_in

GIVEN = ("bank.m=1", "bank.r=d", "bank.activation=identity", "layer=[4,12]", "family=all", "train.steps=1")


@pytest.mark.parametrize(
    ("text", "size"), [("1.9GB", 1_900_000_000), ("800 mb", 800_000_000), ("2GiB", 2 << 30), ("4096", 4096)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert bytes_of_text(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.9 parsecs", "0", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.size="):
        bytes_of_text(text)


@pytest.mark.parametrize("coded", ["true", "false"])
def test_the_files_of_the_patched_model_are_of_the_size(tmp_path: Path, coded: str) -> None:
    options = (*GIVEN, "model.size=8.82MB", f"bank.coded={coded}")
    _, folder = run_in(tmp_path, *options)
    patch(parse([str(folder), f"out={tmp_path / 'out'}", "format=globe"]))
    held = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.995 * 8.82e6 <= held <= 8.82e6


def test_the_prediction_is_of_that_size() -> None:
    config, checkpoint = to_config(composed(*GIVEN, "model.size=8.82MB")), open_checkpoint(None)
    sized = with_model_size(config, checkpoint, outline(config, checkpoint))
    assert sized.bank.size is not None
    assert sized.bank.size < 0.3
    whole = totals(sized, checkpoint, predict(sized, checkpoint, torch.device("cpu")))
    # headers of files are not predicted, and here they are 2 % of them
    assert 0.97 * 8.82e6 <= whole.patched_bytes[1] <= 8.82e6


@pytest.mark.parametrize(
    "options",
    [
        ("bank.bits=3",),
        ("bank.bits=2.5", "bank.coded=true"),
        ("method=gptq", "bank.bits=3"),
        ("bank.atom_rank=9",),
    ],
)
def test_the_bytes_of_a_bank_are_predicted(tmp_path: Path, options: tuple[str, ...]) -> None:
    _, folder = run_in(tmp_path, "layer=12", "train.steps=1", *options)
    config, checkpoint = to_config(composed("layer=12", *options)), open_checkpoint(None)
    (found,) = predict(config, checkpoint, torch.device("cpu"))
    artefact = read_artefact(folder / "banks" / "layer012.up")
    figures = figures_of_bytes(config, artefact)
    assert figures["bytes"] is not None
    assert 0.97 * found.file_bytes - 128 <= figures["bytes"] <= found.file_bytes + 128


def test_a_size_below_the_rest_is_refused() -> None:
    config, checkpoint = to_config(composed(*GIVEN, "model.size=2MB")), open_checkpoint(None)
    with pytest.raises(ConfigError, match="of all that is not compressed: give a larger size"):
        with_model_size(config, checkpoint, outline(config, checkpoint))


@pytest.mark.parametrize("option", ["bank.size=0.2", "bank.bits=3", "bank.kept=0.5", "method=gptq"])
def test_other_budgets_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="is not possible: give null with"):
        to_config(composed("model.size=8MB", option))
