"""What is in a run's folder already: results that `overwrite=true` replaces, and files that are nobody's to remove."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import globe.fit.one_bank
from globe.errors import ArtefactError, ConfigError
from globe.runs.folder import RunFolder, State
from globe.train import run
from run_support import FakeFit, bytes_of, composed, lines, load

SMALL = ("model.max_experts=4", "bank.m=2", "train.steps=2", "layer=4-5")
BANKS = ("layer004.up", "layer005.up")
OPERATIONS = ("replace", "rename", "unlink", "fsync", "mkdir", "rmdir")


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeFit:
    fit = FakeFit()
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", fit)
    return fit


@contextmanager
def before_each_operation(do: Callable[[str], None]) -> Iterator[None]:
    def announced(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            do(name)
            return operation(*args, **kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, announced(name, getattr(os, name)))
        yield


def results(folder: Path) -> tuple[bytes, ...]:
    return tuple(bytes_of(folder, key) for key in BANKS)


def test_a_wrong_option_beside_overwrite_leaves_the_results(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(composed(*SMALL), folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for wrong in ("layer=99", "model.path=./nowhere", "bank.m=n/3"):
        with pytest.raises(ValueError, match=wrong.partition("=")[0]):
            run(composed(*SMALL, "overwrite=true", wrong), folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_kill_of_a_repetition_leaves_the_old_results_or_the_new_ones(tmp_path: Path) -> None:
    """Whatever the kill: the banks on disk are all old or all new, and the same command ends with the new ones."""
    folder, new = tmp_path / "run", composed(*SMALL, "seed=1", "overwrite=true")
    run(composed(*SMALL), folder)
    (folder / "NOTES.md").write_text("mine")
    (folder / "banks" / "notes.txt").write_text("mine too")
    run(composed(*SMALL, "seed=1"), tmp_path / "fresh")
    old, wanted = results(folder), results(tmp_path / "fresh")
    assert old != wanted
    copies: list[Path] = []
    copying = False

    def copy(name: str) -> None:
        nonlocal copying
        if copying:  # which makes folders itself
            return
        copying = True
        copies.append(tmp_path / f"killed-{len(copies)}-{name}")
        shutil.copytree(folder, copies[-1])
        copying = False

    with before_each_operation(copy):
        run(new, folder)
    assert results(folder) == wanted
    assert len(copies) > 40
    whole = 0
    for number, killed in enumerate(copies):
        if (killed / ".repeated").is_dir():  # the new ones are whole there
            source = killed / ".repeated" if (killed / ".repeated" / "banks").is_dir() else killed
            assert results(source) == wanted
        else:
            assert results(killed) in (old, wanted)
            whole += results(killed) == old
        if number % 4 and not (killed / ".repeated").is_dir():
            continue
        run(new, killed)
        assert results(killed) == wanted, killed.name
        assert {line["step"] for line in lines(killed)} == {1, 2}
        assert load(killed / "status.json")["state"] == "finished"
        assert (killed / "NOTES.md").read_text() == "mine"
        assert (killed / "banks" / "notes.txt").read_text() == "mine too"
        left = {one.name for one in killed.iterdir()}
        files = {"config.yaml", "metrics.jsonl", "status.json", "summary.json", "train.log"}
        assert left == files | {".lock", "NOTES.md", "banks"}
    assert whole > 20


def test_a_repetition_that_fails_leaves_the_old_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    run(composed(*SMALL), folder)
    old = results(folder)

    def stop(fit: int, step: int) -> None:
        if fit == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", FakeFit(stop))
    with pytest.raises(OSError, match="No space"):
        run(composed(*SMALL, "seed=1", "overwrite=true"), folder)
    assert results(folder) == old
    assert load(folder / "status.json")["state"] == "finished"
    assert load(folder / ".repetition" / "status.json")["state"] == "failed"
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", again := FakeFit())
    run(composed(*SMALL, "seed=1", "overwrite=true"), folder)
    assert again.fits == 1, "the bank that the first repetition finished is kept"
    assert not (folder / ".repetition").exists()


@pytest.mark.parametrize(
    "name", ["config.yaml", "banks/x", "notes.txt", ".backup-20240131/x", "metrics.jsonl"]
)
@pytest.mark.parametrize("overwrite", [(), ("overwrite=true",)])
def test_a_folder_that_holds_something_else_is_refused(
    tmp_path: Path, name: str, overwrite: tuple[str, ...]
) -> None:
    file = tmp_path / "folder" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(ConfigError, match=f"holds {name.split('/')[0]} and is no folder of a run"):
        run(composed(*SMALL, *overwrite), tmp_path / "folder")
    assert file.read_text() == "precious"
    assert [one for one in (tmp_path / "folder").rglob("*") if one.is_file()] == [file]


def test_foreign_files_in_the_folder_of_a_run_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(composed(*SMALL), folder)
    for name in (".backup-20240131", ".x.deadbeef", ".status.json.deadbeef"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("mine")
    (folder / "status.json").write_text(
        (folder / "status.json").read_text().replace("finished", "interrupted")
    )
    run(composed(*SMALL), folder)
    assert (folder / ".backup-20240131" / "file").read_text() == "mine"
    assert (folder / ".x.deadbeef" / "file").read_text() == "mine"
    assert (folder / ".status.json.deadbeef" / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", "train.log", "metrics.jsonl", "status.json"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    folder, precious = tmp_path / "run", tmp_path / "precious"
    precious.write_text("precious")
    run(composed(*SMALL), folder)
    status = (folder / "status.json").read_text().replace("finished", "interrupted")
    (folder / "status.json").write_text(status)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(precious)
    with pytest.raises(ConfigError, match=r"not a regular file|is no folder of a run"):
        run(composed(*SMALL), folder)
    assert precious.read_text() == "precious"


def test_a_run_whose_folder_is_removed_meanwhile_does_not_end_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def remove(fit: int, step: int) -> None:
        if (fit, step) == (1, 0):
            shutil.rmtree(folder / "banks" / BANKS[0])

    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", FakeFit(remove))
    with pytest.raises(
        ArtefactError, match=r"was removed or changed while the run went on \(layer004.up is missing\)"
    ):
        run(composed(*SMALL), folder)
    assert load(folder / "status.json")["state"] == "failed"


def test_a_finished_run_is_reported_from_a_disk_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    figure = run(composed(*SMALL), folder)
    capsys.readouterr()
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    assert run(composed(*SMALL), folder) == figure
    assert "layer005.up" in capsys.readouterr().out


def test_the_status_of_a_run_is_its_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin({})
    folder.end(State.failed, "why")
    assert folder.repetition().status is None
    folder.take_repetition()
    assert RunFolder(tmp_path / "run").status == folder.status
