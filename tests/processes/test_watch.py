"""What a sweep as a whole says at its end, and what it does not begin in."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from globe.errors import ConfigError, SweepError
from globe.processes import watch
from globe.runs.folder import RunFolder, State


def failed(folder: Path, why: str) -> None:
    run = RunFolder(folder)
    run.begin({})
    run.end(State.failed, why)


def test_only_what_failed_in_this_sweep_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_sweep", None)
    with watch.outcome():
        pass
    failed(tmp_path / "old", "long ago")
    monkeypatch.setattr(watch, "_sweep", watch._Begun(tmp_path, watch._statuses(tmp_path)))
    with watch.outcome():
        RunFolder(tmp_path / "good").begin({})

    def fail(name: str, why: str, error: Exception | None = None) -> None:
        with watch.outcome():
            failed(tmp_path / name, why)
            if error is not None:
                raise error

    with pytest.raises(SweepError, match=r"1 run of .* failed, such as new \(a reason\): the same command"):
        fail("new", "a reason")
    with pytest.raises(SweepError, match="2 runs of") as caught:
        fail("newer", "another", KeyError("the first"))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"state": "dreaming"}', b"\xff", None])
def test_one_unreadable_status_is_one_failed_run_beside_what_the_others_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    monkeypatch.setattr(watch, "_sweep", watch._Begun(tmp_path, {}))
    RunFolder(tmp_path / "good").begin({})
    RunFolder(tmp_path / "odd").begin({})
    odd = tmp_path / "odd" / "status.json"
    odd.unlink()
    odd.mkdir() if damage is None else odd.write_bytes(damage)
    why = r"1 run of .* failed, such as odd \(its status.json can't be read\)"
    with pytest.raises(SweepError, match=why), watch.outcome():
        pass
    with pytest.raises(SweepError, match=r"2 runs of .* failed"), watch.outcome():
        failed(tmp_path / "bad", "a reason")


@pytest.mark.parametrize("name", ["multirun.yaml", "optimization_results.yaml"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "device"])
def test_what_hydra_writes_of_a_sweep_goes_through_no_link_and_into_no_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.setattr(watch, "_sweep", None)
    foreign = tmp_path / "foreign"
    foreign.write_text("mine")
    (tmp_path / "s").mkdir()
    match kind:
        case "link":
            (tmp_path / "s" / name).symlink_to(foreign)
        case "dangling":
            (tmp_path / "s" / name).symlink_to(tmp_path / "absent")
        case "pipe":
            os.mkfifo(tmp_path / "s" / name)
        case "folder":
            (tmp_path / "s" / name).mkdir()
        case "device":
            try:
                os.mknod(
                    tmp_path / "s" / name, 0o666 | 0o020000, os.makedev(1, 7)
                )  # a full device of our own
            except PermissionError:
                pytest.skip("only root makes device nodes")
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "s")}}})
    with pytest.raises(ConfigError, match=f"{name} is not a regular file"), watch.outcome():
        watch.SweepWatch().on_multirun_start(config)
    assert foreign.read_text() == "mine"
    assert kind != "device" or stat.S_ISCHR((tmp_path / "s" / name).lstat().st_mode)
    assert not (tmp_path / "absent").exists()
