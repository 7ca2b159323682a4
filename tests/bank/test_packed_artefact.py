"""Packed factors in an artefact's files: round trip, bytes, older versions, and sentences for hostile files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_artefact import D, K, M, N, P, R, artefact, assert_same
from torch import Tensor

from globe.bank import file as artefact_file
from globe.bank.compose import rebuild
from globe.bank.file import BankArtefact, read_artefact, write_artefact
from globe.bank.packing import Packed
from globe.bank.rounding import Grid, round_nearest
from globe.errors import ArtefactError
from globe.files import sha256


def packed_artefact(*, low_rank: bool = False, dtype: torch.dtype = torch.bfloat16) -> BankArtefact:
    """Adapters of 3 and 2 bits, atoms of 5."""
    plain = artefact(low_rank=low_rank, dtype=dtype)
    grids = {"adapters": Grid.of((3, 3, 2), R, R)}
    atoms = {"atoms_left": K, "atoms_right": D} if low_rank else {"bank": D}
    grids |= {name: Grid.of(5, width, 4) for name, width in atoms.items()}
    packed = {
        name: Packed.of(round_nearest(getattr(plain, name).float(), grid), torch.ones(len(grid.bits)))
        for name, grid in grids.items()
    }
    values = {name: one.values(dtype) for name, one in packed.items()}
    return replace(plain, packed=packed, **values)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_round_trip(tmp_path: Path, low_rank: bool, dtype: torch.dtype) -> None:
    written = packed_artefact(low_rank=low_rank, dtype=dtype)
    write_artefact(written, tmp_path / "bank")
    found = read_artefact(tmp_path / "bank")
    assert_same(written, found)
    assert found.packed.keys() == written.packed.keys()
    for name, one in written.packed.items():
        assert found.packed[name].grid == one.grid
        assert torch.equal(found.packed[name].words, one.words)
    assert torch.equal(rebuild(found), rebuild(written))
    again = tmp_path / "again"
    write_artefact(found, again)
    assert (again / "bank.safetensors").read_bytes() == (tmp_path / "bank" / "bank.safetensors").read_bytes()


def test_bytes_are_those_of_the_file() -> None:
    packed, plain = packed_artefact(), artefact(dtype=torch.bfloat16)
    assert plain.nbytes == 2 * plain.kept_parameters
    adapters = N * P * (1 + 2) + 2 * R
    bank = M * R * (-(-9 * 5 // 8) + 2 * 3) + 2 * D
    assert packed.nbytes == adapters + bank + 2 * N * M + 2 * 2 * P * D
    assert packed.kept_parameters == plain.kept_parameters


def test_file_holds_no_unpacked_copy(tmp_path: Path) -> None:
    written = packed_artefact()
    write_artefact(written, tmp_path / "bank")
    with safe_open(tmp_path / "bank" / "bank.safetensors", framework="pt") as file:
        names = set(file.keys())
        held = sum(file.get_tensor(name).nbytes for name in names)
    assert "adapters" not in names
    assert "bank" not in names
    assert {"adapters.words", "adapters.scale", "adapters.columns", "bank.words"} <= names
    assert written.scale is not None
    assert held == written.nbytes + written.scale.nbytes
    assert json.loads((tmp_path / "bank" / "globe.json").read_text())["kept_bytes"] == written.nbytes


def rewrite(
    folder: Path, tensors: Callable[[dict[str, Tensor]], None], record: Callable[[Any], None]
) -> None:
    """Change both files as one who knows the format would."""
    path = folder / "bank.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["globe"])
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors(held)
    record(header)
    save_file(held, path, metadata={"globe": json.dumps(header)})
    beside = json.loads((folder / "globe.json").read_text())
    record(beside)
    beside["sha256"] = sha256(path)
    (folder / "globe.json").write_text(json.dumps(beside))


def test_an_artefact_of_version_1_is_read(tmp_path: Path) -> None:
    written = artefact()
    write_artefact(written, tmp_path / "bank")

    def older(record: dict[str, Any]) -> None:
        record["format_version"] = 1
        del record["packed"]

    rewrite(tmp_path / "bank", lambda held: None, older)
    found = read_artefact(tmp_path / "bank")
    assert_same(written, found)
    assert not found.packed


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def edit(held: dict[str, Tensor]) -> None:
        held[name] = change(held[name]).clone()

    return edit


def _layout(**changes: Any) -> Callable[[Any], None]:
    return lambda record: record["packed"]["adapters"].update(changes)


HOSTILE: list[tuple[Callable[[dict[str, Tensor]], Any], Callable[[Any], Any], str]] = [
    (lambda held: held.pop("adapters.words"), lambda record: None, "no words"),
    (lambda held: held.update(adapters=torch.ones(N, P, R)), lambda record: None, "twice"),
    (_replace("adapters.words", lambda one: one[:, :, :0]), lambda record: None, "no rows"),
    (_replace("adapters.words", lambda one: one[1:]), lambda record: None, "is due"),
    (_replace("adapters.words", lambda one: one.float()), lambda record: None, "is due"),
    (_replace("adapters.scale", lambda one: one * torch.inf), lambda record: None, "NaN or infinite"),
    (_replace("adapters.scale", lambda one: -one), lambda record: None, "negative scales"),
    (_replace("adapters.scale", lambda one: one.clamp_min(3e38)), lambda record: None, "NaN or infinity"),
    (_replace("bank.scale", lambda one: one[:2]), lambda record: None, "is due"),
    (lambda held: None, _layout(bits=[[8, 1 << 40]]), "a run of columns"),
    (lambda held: None, _layout(bits=[[3, 2], [2, 1], [0, 1 << 19]]), "is due"),
    (lambda held: None, _layout(bits=[[3, 2], [2, 1], [0, 1]]), "is due"),
    (lambda held: None, _layout(bits="3"), "no list of bits"),
    (lambda held: None, _layout(group=None), "a group of None"),
    (lambda held: None, _layout(turned=1 << 70), "rows turned by"),
    (lambda held: None, lambda record: record.update(packed=[1]), "other packed factors"),
    (lambda held: None, lambda record: record["packed"].update(codes={}), "other packed factors"),
    (lambda held: None, lambda record: record["packed"].pop("adapters"), "lacks 'codes' or 'adapters'"),
    (lambda held: held.update({"mean.words": torch.ones(1)}), lambda record: None, "unknown tensors"),
]


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_hostile_packed_files_are_refused_by_sentences(tmp_path: Path, case: int) -> None:
    tensors, record, problem = HOSTILE[case]
    write_artefact(packed_artefact(), tmp_path / "bank")
    rewrite(tmp_path / "bank", tensors, record)
    with pytest.raises(ArtefactError, match=problem) as caught:
        read_artefact(tmp_path / "bank")
    assert "\n" not in str(caught.value)


def test_a_packed_factor_of_another_shape_is_not_written(tmp_path: Path) -> None:
    written = packed_artefact()
    other = replace(written, packed={"adapters": written.packed["bank"]})
    with pytest.raises(ArtefactError, match="the packed 'adapters' has the shape"):
        write_artefact(other, tmp_path / "bank")
    assert artefact_file.FORMAT_VERSION == 2
