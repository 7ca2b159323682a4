"""`python -m globe.inspect`: checkpoints by their headers, runs and banks by every byte."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors import safe_open

import globe.fit.one_bank
import globe.inspect as command
from globe.checkpoint import Checkpoint, open_checkpoint
from globe.checkpoint.remote import headers_only
from globe.checkpoint.shards import ShardReader
from globe.config.command_line import parse_options
from globe.config.commands import start
from globe.errors import CheckpointError
from globe.inspect import InspectOptions, inspect
from globe.inspection.models import expert_groups, predictions, shared_expert
from globe.inspection.show import size
from globe.patch import parse as parse_patch
from globe.patch import patch
from globe.runs.folder import RunFolder
from run_support import EMBEDDED, FakeFit, load, run_in
from tiny_models import write_tiny


def run_command(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["globe.inspect", *arguments])
        try:
            start(command.main)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two banks; copy it before doing harm."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(globe.fit.one_bank, "fit_bank", FakeFit())
        root = tmp_path_factory.mktemp("runs")
        _, folder = run_in(
            root, "family=both", "model.max_experts=6", "bank.m=2", "bank.r=11", "train.steps=2"
        )
    return folder


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_the_embedded_model_is_told_without_reading_a_weight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(ShardReader, "read", refuse)
    assert run_command("embedded") == 0
    text = capsys.readouterr().out
    for part in (
        "qwen2_moe",
        f"{open_checkpoint(None).total_parameters:,} parameters",
        "24 of 24 layers",
        "0-23",
        "16 x 48 x 64",
        "bfloat16",
        "4 experts a",
    ):
        assert part in text, part
    assert "8 x 48" in text  # n/2 x p


def test_figures_of_a_checkpoint_agree_with_its_tensors(tmp_path: Path) -> None:
    folder = write_tiny("deepseek_v3", tmp_path / "tiny")
    found, damaged = inspect(InspectOptions(path=str(folder)))
    assert damaged == {}
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found["parameters"] == sum(one.numel() for one in tensors.values())
    assert found["bytes"] == sum(one.nbytes for one in tensors.values())
    routed = [one for name, one in tensors.items() if ".experts." in name]
    assert found["routed_parameters"] == sum(one.numel() for one in routed)
    assert found["moe_layers"] == [1]
    groups = {group["family"]: group for group in found["experts"]}
    assert [(groups[f]["n"], groups[f]["p"], groups[f]["d"]) for f in ("gate", "up", "down")] == [
        (6, 20, 24),
        (6, 20, 24),
        (6, 20, 24),  # as banks see it: rows are those of the stored matrix's columns
    ]
    assert found["shared"] == {"p": 20, "d": 24, "layers": [1]}
    assert json.loads(json.dumps(found)) == found


def test_what_is_predicted_is_what_a_run_keeps(original: Path) -> None:
    checkpoint = open_checkpoint(None)
    (row,) = predictions(checkpoint, ["2"], ["11"])
    n, p, d = EMBEDDED.n, EMBEDDED.p, EMBEDDED.d
    one = n * p * 11 + 2 * 11 * d + n * 2 + 1  # adapters, atoms, codes, mean
    dense = n * p * d
    assert row["kept"] == pytest.approx(one / dense)
    assert row["parameters"] == checkpoint.total_parameters - 48 * (dense - one)
    assert row["kept_model"] == pytest.approx(row["parameters"] / checkpoint.total_parameters)
    summary = load(original / "summary.json")["banks"][0]
    few = 6 * p * 11 + 2 * 11 * d + 6 * 2 + 1
    assert summary["kept_parameters"] == few  # the same formula, for the six experts of the run


def test_sizes_that_do_not_come_out_are_rounded_and_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny("olmoe", tmp_path / "tiny")  # 6 experts of 20 x 24
    (row,) = predictions(Checkpoint(_source(folder)), ["n/4"], ["3p/4"])
    (sizes,) = row["sizes"]
    assert (sizes["m"], sizes["r"], sizes["rounded"]) == (2, 15, True)
    assert run_command(str(folder), "m=[n/4,3]", "r=[p]") == 0
    text = capsys.readouterr().out
    assert "2 x 20~" in text
    assert "3 x 20 " in text
    assert "~ is rounded" in text


def test_a_family_that_an_architecture_lacks_is_left_out(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_tiny("nemotron_h", tmp_path / "tiny")))
    assert {group["family"] for group in expert_groups(checkpoint)} == {"up", "down"}
    assert predictions(checkpoint, ["n/2"], ["p/2"])[0]["kept"] > 0
    assert shared_expert(open_checkpoint(str(write_tiny("mixtral", tmp_path / "other")))) is None


@pytest.mark.parametrize("form", ["dense", "globe"])
def test_a_patched_checkpoint_says_what_it_was_made_from(
    form: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patch(parse_patch([f"run={original}", f"out={tmp_path / 'out'}", f"format={form}"]))
    found, _ = inspect(InspectOptions(path=str(tmp_path / "out")))
    assert found["kind"] == {"dense": "checkpoint", "globe": "compact"}[form]
    assert run_command(str(tmp_path / "out")) == 0
    assert f"written by globe.patch ({form}) from globe-tiny: 2 banks" in capsys.readouterr().out


def _source(folder: Path) -> Any:
    from globe.checkpoint.hub import resolve

    return resolve(str(folder))


class Hub:
    """Stands in for the hub: hands out config.json and headers of a folder, and nothing else."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("weights were downloaded")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(folder / "config.json"))
        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", self.metadata)

    def metadata(self, hub_id: str, *, revision: str | None) -> Any:
        reader = ShardReader(self.folder)
        files: dict[str, Any] = {}
        for shard in reader.files:
            header = json.loads(reader.file(shard).header[8:])
            tensors = {name: TensorInfo(**one) for name, one in header.items() if name != "__metadata__"}
            files[shard] = SafetensorsFileMetadata({}, tensors)
        return SafetensorsRepoMetadata(None, len(files) > 1, dict(reader.index), files)


@pytest.mark.parametrize("shard_bytes", [None, 4000])
def test_of_a_hub_model_only_headers_are_fetched(
    shard_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "tiny")
    if shard_bytes is not None:
        folder = _sharded(folder, tmp_path / "sharded", shard_bytes)
        assert len(list(folder.glob("*.safetensors"))) > 1
    Hub(folder, monkeypatch)
    here, _ = inspect(InspectOptions(path=str(folder)))
    there, _ = inspect(InspectOptions(path="owner/name", revision="main"))
    assert there["source"] == {"id": "owner/name", "revision": "main", "model_type": "qwen2_moe"}
    assert there | {"source": None} == here | {"source": None}
    assert Checkpoint(headers_only("owner/name")).total_parameters == here["parameters"]


def _sharded(folder: Path, target: Path, shard_bytes: int) -> Path:
    from globe.checkpoint import ShardWriter, copy_support_files

    reader = ShardReader(folder)
    with ShardWriter(target, shard_bytes) as writer:
        copy_support_files(reader, writer.folder)
        for name in reader.names:
            writer.write(name, reader.read(name))
    return target


def test_a_hub_model_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        CheckpointError, match=r"^path='owner/name' is neither a folder here nor in the hub cache"
    ):
        inspect(InspectOptions(path="owner/name"))


# --- runs and banks -------------------------------------------------------------------------------------------------


def test_a_run_is_told_with_its_banks(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(str(made), "json=true") == 0
    found = json.loads(capsys.readouterr().out)
    summary = load(made / "summary.json")
    assert (found["kind"], found["state"], found["damaged"]) == ("run", "finished", {})
    assert found["summary"]["relfrob"] == summary["relfrob"]
    banks = {bank["key"]: bank for bank in found["banks"]}
    assert sorted(banks) == ["layer012.gate", "layer012.up"]
    up = banks["layer012.up"]
    assert [up[name] for name in ("n", "p", "d", "m", "r", "intact")] == [
        6,
        EMBEDDED.p,
        EMBEDDED.d,
        2,
        11,
        True,
    ]
    assert up["members"] == [{"layer": 12, "family": "up", "experts": 6}]
    assert up["figures"]["relfrob"] == summary["banks"][0]["relfrob"]
    assert up["source"]["id"] == "globe-tiny"
    assert run_command(str(made)) == 0
    text = capsys.readouterr().out
    assert "run: finished" in text
    assert "learned from globe-tiny, 2 hashes of tensors" in text


def test_a_single_bank_is_told_in_detail(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(f"path={made / 'banks' / 'layer012.gate'}") == 0
    text = capsys.readouterr().out
    assert "layer 12 gate (6 experts); phi: silu" in text
    assert "stop all steps were taken" in text


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def _other_error(file: Path) -> None:
    record = load(file)
    record["banks"][0]["relfrob"] = 0.5
    file.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("banks/layer012.up/bank.safetensors", _flip),
        ("banks/layer012.up/bank.safetensors", lambda file: file.unlink()),
        ("banks/layer012.up/globe.json", lambda file: file.write_text("{")),
        ("summary.json", lambda file: file.write_text("{}")),
        ("summary.json", lambda file: file.unlink()),
        ("summary.json", _other_error),
        ("status.json", lambda file: file.write_text("[]")),
        ("config.yaml", lambda file: file.write_text("a: [")),
        ("metrics.jsonl", lambda file: file.write_text('{"bank": ')),
        ("banks/layer012.up", shutil.rmtree),
    ],
)
def test_the_damaged_file_is_named_and_the_exit_code_tells(
    name: str, harm: Any, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(made / name)
    assert run_command(str(made), "json=true") == 1
    shown = capsys.readouterr()
    damaged = json.loads(shown.out)["damaged"]
    assert list(damaged) == [str(made / name)]
    first, last = shown.err.splitlines()
    assert str(made / name) in first
    assert last == f"1 of the files of {made} can't be trusted"
    assert run_command(str(made)) == 1
    assert "run: " in capsys.readouterr().out


def test_a_fit_that_was_cut_off_is_no_damage(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "banks" / "layer013.up.partial").mkdir()
    folder = RunFolder(made)
    folder.begin(load(made / "status.json"))
    (made / "metrics.jsonl").write_text('{"bank": "layer013.up", "st')
    assert run_command(str(made)) == 0
    text = capsys.readouterr().out
    assert "run: running" in text
    assert "goes on with: layer013.up" in text


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "path is missing"),
        (["nowhere"], "path='nowhere' is neither a folder here nor a hub id"),
        (["empty"], "empty has no config.json"),
        (["runs"], "runs is a folder of runs: give one of them, or python -m globe.report sweep=runs"),
        (["embedded", "m=[q/4]"], "m='q/4' is not understood"),
        (["embedded", "r=p"], "give a list"),
        (["embedded", "json=perhaps"], "give true or false"),
        (["embedded", "other"], "'other' is not understood"),
        (["embedded", "colour=red"], "colour is not an option: give one of path, revision, m, r, json"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_1(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "status.json").write_text("{}")
    assert run_command(*arguments) == 1
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.count("\n") == 1


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n{one.name}=" in text for one in fields(InspectOptions))
    given = parse_options(InspectOptions, ["a/b", "json=true"], positional="path")
    assert given == InspectOptions(path="a/b", json=True)
    assert parse_options(InspectOptions, ["path=a=b"], positional="path").path == "a=b"


def test_bytes_in_a_unit_that_fits() -> None:
    assert [size(count) for count in (0, 999, 1000, 692_060_160, 15 * 10**9, 10**15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "692.1 MB",
        "15.0 GB",
        "1000.0 TB",
    ]


def test_a_hostile_run_is_told_in_plain_letters(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipes are not waited for, codes of the terminal are shown, nothing is looked up in the environment."""
    import os

    monkeypatch.setenv("SECRET", "hunter2")
    (made / "metrics.jsonl").unlink()
    os.mkfifo(made / "metrics.jsonl")
    (made / "config.yaml").write_text("a: &a [${oc.env:SECRET}]\nb: *a\n")
    status = load(made / "status.json")
    (made / "status.json").write_text(json.dumps(status | {"error": "\x1b[2J[red]${oc.env:SECRET}"}))
    assert run_command(str(made)) == 1
    shown = capsys.readouterr()
    assert "\\x1b[2J[red]${oc.env:SECRET}" in shown.out
    assert "\x1b[2J" not in shown.out + shown.err
    assert "hunter2" not in shown.out + shown.err
    assert "metrics.jsonl holds lines that are not JSON" in shown.err
    assert "config.yaml is missing or can't be read" in shown.err


def test_a_patch_record_of_somebody_else_is_said_to_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    from globe.inspection.show import show_model

    found = {
        "kind": "compact", "source": {"id": "x", "revision": None}, "model_type": "globe_x", "dtypes": {}, "files": 1,
        "parameters": 1, "bytes": 1,
    }  # fmt: skip
    for record in ({}, {"parameters": []}, {"parameters": {"kept_of_families": "all"}, "banks": 3}):
        show_model(found | {"patched": record})
        assert "is not what globe.patch writes" in capsys.readouterr().out


def test_the_rank_of_atoms_is_explained_where_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from globe.inspection.show import show_banks

    bank = {
        "key": "a",
        "intact": True,
        "figures": {"relfrob": "x"},
        "source": {"id": ["y"]},
        "dtype": "float32",
    }
    bank |= dict.fromkeys(("n", "p", "d", "m", "r"), 3) | {"kept": 0.5, "bytes": 7, "activation": "silu"}
    bank |= {"lam": 1.0, "seed": 1, "members": []}
    show_banks({"kind": "bank", "banks": [bank | {"atom_rank": 2}]})
    assert "k is the rank of atoms" in capsys.readouterr().out
    show_banks({"kind": "bank", "banks": [bank | {"atom_rank": None}]})
    assert "k is the rank" not in capsys.readouterr().out
