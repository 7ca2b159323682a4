"""Packed factors in compact checkpoints: the model of plain factors in fewer bytes; sentences for bad files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import random_bank, write_run
from safetensors.torch import load_file, save_file
from test_globe_checkpoint import logits, reference, tensors, write

from globe.bank.coded import Coded
from globe.bank.file import BankArtefact
from globe.bank.packed_tensors import Stored
from globe.bank.packing import Packed
from globe.bank.rounding import Grid, LevelGrid, StepGrid, round_nearest
from globe.checkpoint import open_checkpoint
from globe.errors import ArtefactError, CheckpointError
from globe.hf import load, patch_model
from globe.hf.few_bits import FewBits
from globe.patch import parse, patch
from tiny_models import load_tiny


def packed(bank: BankArtefact, *, leveled: bool = False, coded: bool = False) -> BankArtefact:
    """Adapters of 2 to 4 bits whose rows are turned, or differ in their bits, or coded, and atoms of 5 bits."""
    r = bank.r
    bits = tuple(4 if j < 3 else 3 if j < 6 else 2 for j in range(r))
    grid: Grid | LevelGrid = Grid.of(bits, r, 5)
    if leveled:
        levels = torch.arange(bank.n * bank.p).view(bank.n, bank.p) % 7 % 3
        grid = LevelGrid((bits, (0,) * r, (3,) * r), levels.to(torch.uint8))
    turned = None if leveled else 3
    columns = torch.linspace(0.5, 1, r)
    found: dict[str, Stored] = {"adapters": Packed.of(round_nearest(bank.adapters, grid), columns, turned)}
    if coded:
        steps = StepGrid(r, (torch.arange(bank.n * bank.p).view(bank.n, bank.p) % 3).to(torch.uint8))
        found["adapters"] = Coded.of(round_nearest(bank.adapters / columns / 0.05, steps), columns * 0.05)
    for name in ("bank", "atoms_left", "atoms_right"):
        atoms = getattr(bank, name)
        if atoms is not None:
            grid = Grid.of(5, atoms.shape[-1], 8)
            found[name] = Packed.of(round_nearest(atoms, grid))
    return replace(bank, packed=found, **{name: one.values() for name, one in found.items()})


def packed_run(
    source: Path, folder: Path, *, leveled: bool = False, coded: bool = False, **options: Any
) -> Path:
    checkpoint = open_checkpoint(str(source))
    layer = checkpoint.moe_layers[-1]
    banks = [
        random_bank(checkpoint, [(layer, "up")], mean="scalar", **options),
        random_bank(checkpoint, [(checkpoint.moe_layers[0], "gate"), (layer, "gate")], seed=1, **options),
    ]
    return write_run(folder, [packed(one, leveled=leveled, coded=coded) for one in banks])


@pytest.mark.parametrize("form", ["", "low_rank", "leveled", "coded"])
def test_a_packed_checkpoint_is_the_model_of_its_factors(
    form: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny("qwen2_moe")
    run = packed_run(source, tmp_path / "run", experts=(0, 2, 3), **({form: True} if form else {}))
    out, plain = write(run, tmp_path / "out"), write(run, tmp_path / "plain", "packed=false")
    description = json.loads((out / "config.json").read_text())["quantization_config"]
    assert description["globe_version"] == (3 if form == "coded" else 2)
    assert json.loads((plain / "config.json").read_text())["quantization_config"]["globe_version"] == 1
    names = tensors(out)
    assert not any(name.endswith("globe_up.adapters") for name in names)
    assert any(name.endswith("globe_up.adapters.words") for name in names)
    ending = "left.words" if form == "low_rank" else "atoms.words"
    assert any(name.startswith("globe_banks") and name.endswith(ending) for name in names)
    size = {
        path: sum(
            one.nbytes for name, one in tensors(path).items() if "globe" in name and "dense" not in name
        )
        for path in (out, plain)
    }
    assert size[out] < 0.45 * size[plain]
    model = load(out, dtype=torch.float32)
    assert not any(isinstance(module, FewBits) for module in model.modules())
    other = load(plain, dtype=torch.float32)
    own, plainly = dict(model.named_parameters()), dict(other.named_parameters())
    assert own.keys() == plainly.keys()
    assert all(torch.equal(own[name], plainly[name]) for name in own)
    # numbers that lie elsewhere in memory may be multiplied in another order
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model), logits(reference(source, run)), rtol=1e-4, atol=1e-4)
    in_memory = patch_model(load_tiny(source, "qwen2_moe"), run)
    torch.testing.assert_close(logits(model), logits(in_memory), rtol=1e-4, atol=1e-4)


def test_a_loaded_model_can_be_saved_trained_and_made_dense(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = packed_run(tiny("olmoe"), tmp_path / "run")
    model = load(write(run, tmp_path / "out"), dtype=torch.float32)
    adapters = [one for name, one in model.named_parameters() if name.endswith("globe_up.adapters")]
    assert adapters
    assert all(one.requires_grad for one in adapters)
    model.save_pretrained(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["globe_version"]
        == 1
    )
    torch.testing.assert_close(logits(load(tmp_path / "saved", dtype=torch.float32)), logits(model))
    dense = load(tmp_path / "out", dtype=torch.float32, dequantize=True)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)


def test_dtypes_of_packed_tensors_survive_loading_in_another(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = packed_run(tiny("olmoe"), tmp_path / "run")
    out = write(run, tmp_path / "out")
    wide, narrow = load(out, dtype=torch.float32), load(out, dtype=torch.float16)
    for (name, one), (other, two) in zip(wide.named_parameters(), narrow.named_parameters(), strict=True):
        assert name == other
        assert two.dtype == torch.float16
        if name.endswith("adapters"):
            assert torch.equal(one.half(), two)


def test_dense_output_holds_the_rounded_experts(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("olmoe")
    run = packed_run(source, tmp_path / "run")
    record = patch(parse([f"run={run}", f"out={tmp_path / 'dense'}", "format=dense"]))
    torch.testing.assert_close(
        logits(load_tiny(tmp_path / "dense", "olmoe")),
        logits(reference(source, run, "olmoe")),
        rtol=1e-5,
        atol=1e-5,
    )
    assert record["kept_bytes"] < record["parameters"]["kept"]


def damage(out: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    config, held = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    change(config["quantization_config"], held)
    (out / "config.json").write_text(json.dumps(config))
    save_file(held, out / "model.safetensors", {"format": "pt"})


def first(held: dict[str, torch.Tensor], ending: str) -> str:
    return next(name for name in held if name.endswith(ending))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            lambda banks, held: held.pop(first(held, "adapters.words")),
            CheckpointError,
            "lacks .*adapters.words",
        ),
        (
            lambda banks, held: held[first(held, "adapters.scale")].fill_(float("nan")),
            ArtefactError,
            "scale that are NaN",
        ),
        (
            lambda banks, held: banks["banks"][0]["packed"]["adapters"].update(bits=[[3, 1]]),
            ArtefactError,
            "has not the 13 columns",
        ),
        (
            lambda banks, held: banks["banks"][0]["packed"]["adapters"].update(bits=[[3, 1 << 50]]),
            ArtefactError,
            "malformed",
        ),
        (
            lambda banks, held: banks["banks"][0]["packed"].update(codes={"absent": []}),
            ArtefactError,
            "no packed",
        ),
        (lambda banks, held: banks["banks"][0]["packed"].update(adapters=3), ArtefactError, "malformed"),
    ],
)
def test_bad_packed_checkpoints_are_refused_by_sentences(
    change: Callable[..., None],
    error: type[Exception],
    sentence: str,
    tiny: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    out = write(packed_run(tiny("olmoe"), tmp_path / "run"), tmp_path / "out")
    damage(out, change)
    with pytest.raises(error, match=sentence):
        load(out)


@pytest.mark.parametrize("given", [[1], [1, 2, 3], "many", [-1]])
def test_wrong_lengths_of_streams_are_refused(
    given: object, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    out = write(packed_run(tiny("olmoe"), tmp_path / "run", leveled=True), tmp_path / "out")
    damage(out, lambda banks, held: banks["banks"][0]["packed"]["adapters"].update(bytes=given))
    with pytest.raises((ArtefactError, CheckpointError)):
        load(out)
