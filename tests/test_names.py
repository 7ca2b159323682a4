"""Every name in the package is defined: type checker and linter are told to overlook it, for the sake of shapes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def undefined(path: Path) -> list[str]:
    """Names without a definition; the single letters of a shape such as Float[Tensor, "n p d"] look like ones."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--ignore-noqa"]
    done = subprocess.run(
        [*command, "--no-cache", "--output-format", "json", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = []
    for one in json.loads(done.stdout):
        name = re.findall(r"`([^`]+)`", one["message"])[0]
        if not re.fullmatch(r"_?[a-zA-Z]", name):
            found.append(f"{Path(one['filename']).name}:{one['location']['row']}: {name}")
    return found


def test_every_name_is_defined() -> None:
    assert undefined(ROOT / "src") == []


def test_a_name_that_is_not_is_found(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text('def f(x: Float[Tensor, "n"]) -> None:\n    missing(x)\n')
    assert undefined(file) == ["some.py:1: Float", "some.py:1: Tensor", "some.py:2: missing"]
