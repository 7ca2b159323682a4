"""Where a patched checkpoint goes: nothing is lost that globe.patch did not write, whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import random_run

from globe.errors import ConfigError
from globe.hf.destination import RECORD
from globe.patch import parse, patch


@pytest.fixture
def run(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return random_run(tiny("olmoe"), tmp_path / "run", ["up"])


def patched(run: Path, out: Path, *options: str) -> None:
    patch(parse([f"run={run}", f"out={out}", *options]))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("form", ["dense", "globe"])
def test_an_overwriting_patch_keeps_what_it_did_not_write(form: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    patched(run, out)
    (out / "NOTES.md").write_text("precious")
    (out / "mine" / "below").mkdir(parents=True)
    (out / "mine" / "below" / "file").write_text("precious too")
    (out / "link").symlink_to("NOTES.md")
    before = json.loads((out / RECORD).read_text())["files"]
    patched(run, out, "overwrite=true", f"format={form}")
    assert (out / "NOTES.md").read_text() == "precious"
    assert (out / "mine" / "below" / "file").read_text() == "precious too"
    assert os.readlink(out / "link") == "NOTES.md"
    record = json.loads((out / RECORD).read_text())
    assert record["format"] == form
    assert sorted(set(snapshot(out)) - {"NOTES.md", "mine/below/file", "link"}) == record["files"]
    assert {"config.json", "model.safetensors", RECORD} <= set(before)
    patched(run, out, "overwrite=true")  # and once more
    assert (out / "NOTES.md").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


def test_a_file_in_the_way_of_the_new_result_is_not_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    patched(run, out)
    record = json.loads((out / RECORD).read_text())
    record["files"].remove("config.json")  # as if somebody else had put it there
    (out / RECORD).write_text(json.dumps(record))
    before = snapshot(out)
    with pytest.raises(ConfigError, match=r"config\.json is not of the earlier result and in the way"):
        patched(run, out, "overwrite=true")
    assert snapshot(out) == before


@pytest.mark.parametrize(
    "record", ["{}", "[]", "not JSON", "[" * 10**5, '{"files": 3}', '{"files": [3]}', None]
)
def test_a_folder_without_a_good_record_is_refused(run: Path, tmp_path: Path, record: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    if record is not None:
        (out / RECORD).write_text(record)
    with pytest.raises(ConfigError, match="overwrite=true won't replace"):
        patched(run, out, "overwrite=true")
    assert (out / "precious").exists()


@pytest.mark.parametrize("place", ["model", "model/below", "run", "run/banks", "run/dense", "."])
def test_a_folder_that_overlaps_what_is_read_is_refused(
    place: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """All of it would have been lost: a record in the folder was enough to have it replaced."""
    import shutil

    model = Path(shutil.copytree(tiny("olmoe"), tmp_path / "model"))
    run = random_run(model, tmp_path / "run", ["up"])
    out = tmp_path / place
    if out.exists():
        (out / RECORD).write_text('{"files": []}')
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="overlap: give another folder"):
        patched(run, out, "overwrite=true", f"model.path={model}")
    assert snapshot(tmp_path) == before


def test_a_model_whose_files_are_links_into_the_folder_is_not_lost(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = random_run(tiny("olmoe"), tmp_path / "run", ["up"])
    patched(run, tmp_path / "out")
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).symlink_to(tmp_path / "out" / name)
    second = random_run(model, tmp_path / "second", ["up"])
    with pytest.raises(ConfigError, match="overlap"):
        patched(second, tmp_path / "out", "overwrite=true")


KILLED = """
    import os, signal, sys
    import globe.checkpoint.rewrite as rewrite
    import globe.hf.globe_checkpoint as compact
    from globe.patch import parse, patch

    def die(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    rewrite._copy_shard = compact.write_record = die
    patch(parse(sys.argv[1:]))
"""


@pytest.mark.parametrize("form", ["dense", "globe"])
def test_a_killed_patch_leaves_what_was_there_and_the_next_one_cleans_up(
    form: str, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    patched(run, out)
    before = snapshot(out)
    (tmp_path / ".backup-20240131").mkdir()
    for _ in range(2):
        arguments = [f"run={run}", f"out={out}", f"format={form}", "overwrite=true"]
        ended = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *arguments], check=False)
        assert ended.returncode == -signal.SIGKILL
        assert snapshot(out) == before
        assert len(os.listdir(tmp_path)) == 4  # the second start has removed what the first left
    with pytest.raises(ConfigError):  # even one that ends with a sentence
        patched(run, out)
    assert sorted(os.listdir(tmp_path)) == [".backup-20240131", "out", "run"]
