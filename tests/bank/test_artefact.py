"""The file format: round trip, equal bytes, all-or-nothing writes, and a sentence for every file that is
not right.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from globe.bank import file as artefact_file
from globe.bank.file import BankArtefact, Member, read_artefact, validate, write_artefact
from globe.errors import ArtefactError

N, P, D, M, R, K = 6, 5, 9, 4, 3, 2
MEMBERS = (Member(3, "up", 0, 4, (0, 2, 5, -1)), Member(7, "gate", 4, N, (1, 0)))


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def artefact(*, low_rank: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> BankArtefact:
    bank = {"bank": gaussian(M, R, D, dtype=dtype)}
    if low_rank:
        bank = {
            "atoms_left": gaussian(M, R, K, seed=4, dtype=dtype),
            "atoms_right": gaussian(M, K, D, seed=5, dtype=dtype),
        }
    whole = BankArtefact(
        members=MEMBERS,
        codes=gaussian(N, M, seed=1, dtype=dtype).clamp_min(0),
        adapters=gaussian(N, P, R, seed=2, dtype=dtype),
        activation="silu",
        lam=0.75,
        mean=gaussian(2, P, D, seed=3, dtype=dtype),
        scale=gaussian(N, seed=6).abs(),
        source={"id": "some/model", "revision": None, "sha256": "ab" * 32},
        config={"bank": {"m": "n/4"}},
        seed=11,
        metrics={"relfrob": 0.25, "seconds": 3.5},
        **bank,
    )
    return replace(whole, **changes)


def assert_same(first: BankArtefact, second: BankArtefact) -> None:
    one, two = first.tensors(), second.tensors()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name]), name
    for name in ("members", "activation", "lam", "source", "config", "seed", "metrics"):
        assert getattr(first, name) == getattr(second, name), name


# round trip


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_round_trip(tmp_path: Path, low_rank: bool, dtype: torch.dtype) -> None:
    written = artefact(low_rank=low_rank, dtype=dtype)
    write_artefact(written, tmp_path / "deep" / "bank")
    assert_same(written, read_artefact(tmp_path / "deep" / "bank"))
    assert_same(written, read_artefact(str(tmp_path / "deep" / "bank"), verify_hash=False))


@pytest.mark.parametrize("mean", [None, torch.tensor([0.5, -0.25]), gaussian(2, P, D)])
@pytest.mark.parametrize("scale", [None, gaussian(2).abs(), gaussian(N).abs(), gaussian(N, P).abs()])
def test_every_kind_of_mean_and_scale(
    tmp_path: Path, mean: torch.Tensor | None, scale: torch.Tensor | None
) -> None:
    written = artefact(mean=mean, scale=scale)
    write_artefact(written, tmp_path / "bank")
    assert_same(written, read_artefact(tmp_path / "bank"))


def test_sizes_and_counts() -> None:
    dense, low = artefact(), artefact(low_rank=True, mean=torch.zeros(2))
    for one in (dense, low):
        assert (one.n, one.p, one.d, one.m, one.r) == (N, P, D, M, R)
        assert one.family_parameters == N * P * D
    assert dense.atom_rank is None
    assert low.atom_rank == K
    assert dense.kept_parameters == N * P * R + M * R * D + N * M + 2 * P * D
    assert low.kept_parameters == N * P * R + M * K * (R + D) + N * M + 2
    assert artefact(mean=None).kept_parameters == N * P * R + M * R * D + N * M


def test_equal_artefacts_give_equal_bytes_whatever_their_times(tmp_path: Path) -> None:
    write_artefact(artefact(), tmp_path / "a")
    write_artefact(artefact(metrics={"seconds": 99.0}, config={"output": "elsewhere"}), tmp_path / "b")
    write_artefact(artefact(seed=12), tmp_path / "c")
    content = {name: (tmp_path / name / "bank.safetensors").read_bytes() for name in "abc"}
    assert content["a"] == content["b"]
    assert content["a"] != content["c"]
    write_artefact(artefact(), tmp_path / "a2")
    assert (tmp_path / "a" / "globe.json").read_bytes() == (tmp_path / "a2" / "globe.json").read_bytes()


def test_slices_of_one_batch_and_strided_tensors_can_be_written(tmp_path: Path) -> None:
    block = gaussian(2 * N, P, D)
    strided = gaussian(N, R, P).mT
    written = artefact(mean=block[1:3], adapters=strided, scale=block[5:11, :, 0])
    write_artefact(written, tmp_path / "bank")
    assert_same(written, read_artefact(tmp_path / "bank"))


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    write_artefact(artefact(), tmp_path / "bank")
    (tmp_path / "plain").write_text("")
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for name in ("bank.safetensors", "globe.json"):
        assert stat.S_IMODE((tmp_path / "bank" / name).stat().st_mode) == expected


# all or nothing


def test_overwriting_replaces_the_artefact_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_artefact(artefact(seed=1), tmp_path / "bank")
    write_artefact(artefact(seed=2), tmp_path / "bank")
    assert read_artefact(tmp_path / "bank").seed == 2
    assert os.listdir(tmp_path) == ["bank"]


@pytest.mark.parametrize("step", ["save_file", "sync", "sha256"])
@pytest.mark.parametrize("before", [False, True])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, before: bool
) -> None:
    if before:
        write_artefact(artefact(seed=1), tmp_path / "bank")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(artefact_file, step, full)
        with pytest.raises(ArtefactError, match=r"No space left on device.*free space"):
            write_artefact(artefact(seed=2), tmp_path / "bank")
    assert os.listdir(tmp_path) == (["bank"] if before else [])
    if before:
        assert read_artefact(tmp_path / "bank").seed == 1


def test_a_failure_between_the_two_renames_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artefact(artefact(seed=1), tmp_path / "bank")
    plain, calls = os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_fails)
        with pytest.raises(ArtefactError, match="Input/output error"):
            write_artefact(artefact(seed=2), tmp_path / "bank")
    assert read_artefact(tmp_path / "bank").seed == 1
    assert os.listdir(tmp_path) == ["bank"]


def test_foreign_folders_and_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("also mine")
    for name in ("mine", "file"):
        with pytest.raises(ArtefactError, match="is not a GloBE artefact"):
            write_artefact(artefact(), tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    write_artefact(artefact(), tmp_path / "empty")
    assert read_artefact(tmp_path / "empty").seed == 11
    with pytest.raises(ArtefactError, match="can't be written"):
        write_artefact(artefact(), tmp_path / "file" / "bank")


@pytest.mark.parametrize("record", ["metrics", "config", "source"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_records_that_are_not_plain_json_are_refused(tmp_path: Path, record: str, value: object) -> None:
    with pytest.raises(ArtefactError, match="not plain JSON"):
        write_artefact(artefact(**{record: {"figure": value}}), tmp_path / "bank")
    assert os.listdir(tmp_path) == []


# what is not valid


def poisoned(name: str, value: float) -> Callable[[BankArtefact], BankArtefact]:
    def change(good: BankArtefact) -> BankArtefact:
        tensor = getattr(good, name).clone()
        tensor.view(-1)[-1] = value
        return replace(good, **{name: tensor})

    return change


def members(*new: Member) -> Callable[[BankArtefact], BankArtefact]:
    return lambda good: replace(good, members=new)


INVALID: dict[str, tuple[Callable[[BankArtefact], BankArtefact], str]] = {
    **{
        f"NaN in {name}": (poisoned(name, float("nan")), f"'{name}' holds NaN")
        for name in ("bank", "codes", "adapters", "mean", "scale")
    },
    "infinite bank": (poisoned("bank", float("inf")), "'bank' holds NaN or infinity"),
    "negative code": (poisoned("codes", -1e-8), "'codes' holds negative"),
    "no atoms": (lambda a: replace(a, bank=None), "needs either 'bank' or both"),
    "both kinds of atoms": (
        lambda a: replace(a, atoms_left=gaussian(M, R, K), atoms_right=gaussian(M, K, D)),
        "needs either 'bank' or both",
    ),
    "half of low-rank atoms": (lambda a: replace(a, bank=None, atoms_left=gaussian(M, R, K)), "needs either"),
    "low-rank atoms that do not meet": (
        lambda a: replace(a, bank=None, atoms_left=gaussian(M, R, K), atoms_right=gaussian(M, K + 1, D)),
        "'atoms_right' has shape",
    ),
    "codes of another n": (lambda a: replace(a, codes=torch.ones(N + 1, M)), "has shape"),
    "codes of another m": (lambda a: replace(a, codes=torch.ones(N, M + 1)), "'bank' has shape"),
    "codes of one axis": (lambda a: replace(a, codes=torch.ones(N)), "'codes' has shape"),
    "adapters of another r": (lambda a: replace(a, adapters=torch.ones(N, P, R + 1)), "'bank' has shape"),
    "adapters of two axes": (lambda a: replace(a, adapters=torch.ones(N, P)), "'adapters' has shape"),
    "an empty bank": (lambda a: replace(a, bank=torch.ones(M, R, 0)), "'bank' is empty"),
    "integer codes": (lambda a: replace(a, codes=torch.ones(N, M, dtype=torch.int64)), "dtype torch.int64"),
    "a mean of one expert": (lambda a: replace(a, mean=torch.ones(P, D)), "'mean' has shape"),
    "a scale per column": (lambda a: replace(a, scale=torch.ones(N, D)), "'scale' has shape"),
    "an unknown activation": (lambda a: replace(a, activation="relu"), "activation 'relu' is unknown"),
    "lam above one": (lambda a: replace(a, lam=1.5), "lam=1.5"),
    "lam that is no number": (lambda a: replace(a, lam=float("nan")), "lam=nan"),
    "no members": (members(), "has shape|cover 0 experts"),
    "a gap between members": (
        members(MEMBERS[0], Member(7, "gate", 5, N, (1,))),
        "does not follow the row 4",
    ),
    "members that overlap": (members(MEMBERS[0], Member(7, "gate", 3, N, (1, 0, 2))), "does not follow"),
    "members that end early": (members(MEMBERS[0], Member(7, "gate", 4, 5, (1,))), "cover 5 experts and its"),
    "one member twice": (
        members(MEMBERS[0], replace(MEMBERS[1], layer=3, family="up")),
        "stands there twice",
    ),
    "an expert twice": (
        members(replace(MEMBERS[0], experts=(0, 2, 2, 5)), MEMBERS[1]),
        "one expert for each",
    ),
    "experts too few": (members(replace(MEMBERS[0], experts=(0, 2)), MEMBERS[1]), "one expert for each"),
}


@pytest.mark.parametrize("what", INVALID)
def test_invalid_artefacts_are_neither_written_nor_pass(tmp_path: Path, what: str) -> None:
    change, words = INVALID[what]
    bad = change(artefact())
    with pytest.raises(ArtefactError, match=words) as caught:
        validate(bad, "here")
    assert str(caught.value).startswith("here can't be used")
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtefactError, match=words):
        write_artefact(bad, tmp_path / "bank")
    assert os.listdir(tmp_path) == []


# files that are not right


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_artefact(artefact(), tmp_path / "bank")
    return tmp_path / "bank"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / "globe.json").read_text())
    change(record)
    (folder / "globe.json").write_text(json.dumps(record))


def refused(folder: Path, words: str, *, verify_hash: bool = True) -> None:
    with pytest.raises(ArtefactError, match=words) as caught:
        read_artefact(folder, verify_hash=verify_hash)
    assert "\n" not in str(caught.value)


def test_missing_folders_and_files(folder: Path) -> None:
    refused(folder.parent / "nothing", "globe.json can't be read.*No such file")
    refused(folder / "globe.json", "can't be read")
    (folder / "bank.safetensors").unlink()
    refused(folder, "bank.safetensors can't be read.*No such file")
    refused(folder, "bank.safetensors can't be read", verify_hash=False)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_truncated_tensors(folder: Path, share: float) -> None:
    path = folder / "bank.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(folder, "is not the file globe.json was written for")
    refused(folder, "can't be read.*truncated or foreign", verify_hash=False)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '{"model_type": "qwen2_moe"}', "\x00\x01"])
def test_truncated_and_foreign_records(folder: Path, content: str) -> None:
    (folder / "globe.json").write_text(content)
    refused(folder, "is not JSON|not the record of a GloBE artefact")


def test_a_record_in_another_encoding(folder: Path) -> None:
    (folder / "globe.json").write_bytes(b"\xff\xfe{}")
    refused(folder, "is not UTF-8 text")


def test_a_flipped_bit(folder: Path) -> None:
    path = folder / "bank.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    refused(folder, "is not the file globe.json was written for")


def test_tensors_of_another_artefact(folder: Path) -> None:
    write_artefact(artefact(lam=0.5), folder.parent / "other")
    (folder.parent / "other" / "bank.safetensors").replace(folder / "bank.safetensors")
    refused(folder, "is not the file")
    refused(folder, "differ in 'lam'", verify_hash=False)


@pytest.mark.parametrize("version", [0, 4, True, "1", None])
def test_another_format_version(folder: Path, version: object) -> None:
    edit(folder, lambda record: record.update(format_version=version))
    refused(folder, "format version .* where 3 and earlier are read")


@pytest.mark.parametrize("key", ["members", "sizes", "activation", "lam", "seed", "source", "sha256"])
def test_a_record_that_lacks_or_changes_a_key(folder: Path, key: str) -> None:
    edit(folder, lambda record: record.pop(key))
    refused(folder, f"has no '{key}'|is not the file")
    edit(folder, lambda record: record.update({key: "other"}))
    refused(folder, f"differ in '{key}'|is not the file")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> None:
    """Change tensors and the record together, as a careful forger would."""
    path = folder / "bank.safetensors"
    record = json.loads((folder / "globe.json").read_text())
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["globe"])
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, metadata={"globe": json.dumps(header, sort_keys=True)})
    record |= header | {"sha256": artefact_file.sha256(path)}
    (folder / "globe.json").write_text(json.dumps(record))


def test_the_forger_leaves_a_good_file_readable(folder: Path) -> None:
    rewrite(folder, lambda tensors, header: tensors.update(bank=2 * tensors["bank"]))
    assert torch.equal(read_artefact(folder).tensors()["bank"], 2 * gaussian(M, R, D))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, h: t.pop("codes"), "lacks 'codes' or 'adapters'"),
        (lambda t, h: t.pop("bank"), "needs either"),
        (lambda t, h: t.update(extra=torch.ones(3)), r"unknown tensors \['extra'\]"),
        (lambda t, h: t.update(codes=torch.full((N, M), float("nan"))), "'codes' holds NaN"),
        (lambda t, h: t.update(codes=-torch.ones(N, M)), "'codes' holds negative"),
        (lambda t, h: t.update(adapters=torch.ones(N, R, P)), "'bank' has shape"),
        (lambda t, h: t.update(bank=torch.ones(M, R, D, dtype=torch.int8)), "dtype torch.int8"),
        (lambda t, h: t.update(bank=torch.ones(M, R, D + 1), mean=torch.ones(2)), "sizes in globe.json"),
        (lambda t, h: h.update(activation="exp"), "activation 'exp' is unknown"),
        (lambda t, h: h.update(lam=7), "lam=7"),
        (lambda t, h: h.update(lam="much"), "is damaged"),
        (lambda t, h: h.update(seed=None), "is damaged"),
        (lambda t, h: h.update(source=[1]), "is damaged"),
        (lambda t, h: h["members"][0].pop("experts"), "is damaged"),
        (lambda t, h: h["members"][0].update(experts=["zero"]), "is damaged"),
        (lambda t, h: h.update(members=[3]), "is damaged"),
        (lambda t, h: h["members"][1].update(start=5), "does not follow the row 4"),
    ],
)
def test_consistent_but_wrong_files(
    folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object], words: str
) -> None:
    rewrite(folder, change)
    refused(folder, words)


def test_safetensors_of_another_program(folder: Path) -> None:
    save_file({"model.embed": torch.ones(3, 2)}, folder / "bank.safetensors", metadata={"format": "pt"})
    edit(folder, lambda record: record.update(sha256=artefact_file.sha256(folder / "bank.safetensors")))
    refused(folder, "has no 'globe' metadata: it was not written by GloBE")
