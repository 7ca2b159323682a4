"""The run folder and the checkpoint of a fit: atomic, and tolerant of what a kill leaves behind."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.am.records import FitState
from globe.files import read_record, write_json, write_text
from globe.fit.unfinished_fit import Fitting, read_state, remove_state, write_state
from globe.runs import folder as run_folder
from globe.runs.folder import BankStatus, RunFolder, State

FITTING = Fitting("abc", attempt=1, step=7)


def state(value: float = 1.0) -> FitState:
    bank = torch.arange(30, dtype=torch.float64).view(2, 3, 5) * value
    tensors = {
        "bank": bank,
        "best": bank,  # the same memory
        "part": bank[0],  # a view
        "turned": bank.mT,  # not contiguous
        "flags": torch.tensor([True, False]),
        "generator": torch.Generator().manual_seed(3).get_state(),
        "empty": torch.zeros(0, 4),
    }
    numbers = {"step": 7, "damping": 0.1, "best": math.inf, "on": True, "phase": "dense", "none": None}
    return FitState(tensors, numbers)


# --- files ----------------------------------------------------------------------------------------------------------


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"a": 1})

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "half")
    assert json.loads(file.read_text()) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["summary.json"]


def test_json_that_is_not_finite_is_a_mistake_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": math.nan})


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\x01"])
def test_a_damaged_file_is_said_and_counts_as_none(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.json").write_text(content)
    assert read_record(tmp_path / "absent.json") is None
    assert not caplog.text
    assert read_record(tmp_path / "x.json") is None
    assert f"{tmp_path / 'x.json'} is ignored, it can't be read" in caplog.text


# --- status ---------------------------------------------------------------------------------------------------------


def test_status_survives_a_round_trip_and_ends_what_was_running(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin({"seed": 0})
    folder.report("layer001.up", BankStatus(State.finished, 0, 5))
    folder.report("layer002.up", BankStatus(State.running, 1, 6, "broke once"))
    folder.end(State.interrupted)
    again = RunFolder(tmp_path / "run")
    assert again.status == folder.status
    assert again.status is not None
    assert again.status.banks["layer001.up"].state is State.finished
    assert again.status.banks["layer002.up"] == BankStatus(State.interrupted, 1, 6, "broke once")
    assert again.status.ended is not None


def test_a_status_of_another_version_is_said_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "status.json").write_text('{"state": "dreaming", "started": "", "banks": {}}')
    assert RunFolder(tmp_path).status is None
    assert f"{tmp_path / 'status.json'} is ignored" in caplog.text


def test_recording_does_not_hide_the_error_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.begin({})

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_text", fail)
    with pytest.raises(RuntimeError, match="the first"), folder.recorded(lambda error: None):
        raise RuntimeError("the first")


# --- metrics --------------------------------------------------------------------------------------------------------


def test_rewinding_drops_later_steps_of_one_bank_and_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.rewind_metrics("a", 0)  # nothing there yet
    rows = [{"bank": bank, "step": step} for bank in "ab" for step in (1, 2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    folder.metrics_file.write_text(text + '{"bank": "b", "st')
    folder.rewind_metrics("a", 2)
    kept = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert kept == [row for row in rows if row != {"bank": "a", "step": 3}]
    folder.metrics_file.write_text(text.rstrip("\n"))  # whole, but the line's end is missing
    folder.rewind_metrics("c", 0)
    assert folder.metrics_file.read_text() == "".join(json.dumps(row) + "\n" for row in rows[:-1])


# --- the checkpoint of a fit ----------------------------------------------------------------------------------------


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    before = state()
    write_state(tmp_path / "x.partial", before, FITTING)
    found = read_state(tmp_path / "x.partial", "abc")
    assert found is not None
    after, fitting = found
    assert fitting == FITTING
    assert after.numbers == before.numbers
    for name, value in before.numbers.items():
        assert type(after.numbers[name]) is type(value)
    assert set(after.tensors) == set(before.tensors)
    for name, tensor in before.tensors.items():
        assert after.tensors[name].dtype == tensor.dtype
        assert torch.equal(after.tensors[name], tensor)


@given(value=st.floats(allow_nan=False))
def test_every_float_survives(value: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("state")
    write_state(folder, FitState({"x": torch.zeros(1)}, {"value": value}), FITTING)
    found = read_state(folder, "abc")
    assert found is not None
    kept = found[0].numbers["value"]
    assert isinstance(kept, float)
    assert (kept, math.copysign(1, kept)) == (value, math.copysign(1, value))


def test_the_newest_state_counts_and_old_ones_go(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        write_state(tmp_path, state(value), FITTING)
    found = read_state(tmp_path, "abc")
    assert found is not None
    assert torch.equal(found[0].tensors["bank"], state(3.0).tensors["bank"])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("header", [b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_a_header_that_asks_for_too_much_is_not_read(
    tmp_path: Path, header: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_state(tmp_path, state(), FITTING)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(header)
    os.truncate(file, 1 << 36)  # sparse: it takes long to read, and no room
    monkeypatch.setattr("globe.fit.unfinished_fit.sha256", lambda path: pytest.fail("read to its end"))
    assert read_state(tmp_path, "abc") is None
    assert "the fit starts anew" in caplog.text


@pytest.mark.parametrize("moment", ["save_file", "write_json"])
def test_a_kill_while_writing_leaves_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    import globe.fit.unfinished_fit as module

    write_state(tmp_path, state(1.0), FITTING)

    def kill(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, kill)
        with pytest.raises(KeyboardInterrupt):
            write_state(tmp_path, state(2.0), FITTING)
    found = read_state(tmp_path, "abc")
    assert found is not None
    assert torch.equal(found[0].tensors["bank"], state(1.0).tensors["bank"])
    write_state(tmp_path, state(3.0), FITTING)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_state_of_another_fit_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_state(tmp_path, state(), FITTING)
    assert read_state(tmp_path, "other") is None
    assert "other options or experts" in caplog.text
    assert read_state(tmp_path / "absent", "abc") is None


def test_a_state_that_is_done_with_leaves_nothing(tmp_path: Path) -> None:
    write_state(tmp_path / "x.partial", state(), FITTING)
    remove_state(tmp_path / "x.partial")
    assert not (tmp_path / "x.partial").exists()
    remove_state(tmp_path / "x.partial")
