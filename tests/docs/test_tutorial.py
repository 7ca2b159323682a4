"""The tutorial typed in an empty folder, command by command, as a newcomer would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from globe.embedded import path as embedded_path

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
LEFT_OUT = ("make setup", "source ")
"""What the environment of the tests stands for."""


def typed(text: str) -> Iterator[str]:
    """Yield every command of the page, and every piece of Python as one, in their order."""
    for python, line in re.findall(r"^```python\n([\s\S]*?)^```$|^    (\S.*)$", text, re.MULTILINE):
        if python:
            yield python
        elif not line.startswith(LEFT_OUT):
            yield re.sub(r"\s+#.*", "", line)


def test_the_reader_takes_commands_and_python_and_no_output() -> None:
    page = "Text\n\n    make setup   # once\n    python -m a b=1  # why\n\n```text\nno\n```\n```python\nx = 1\ny\n```\n"
    assert list(typed(page)) == ["python -m a b=1", "x = 1\ny\n"]
    assert len(list(typed(PAGE.read_text()))) >= 18


@pytest.mark.slow
def test_every_command_of_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in typed(PAGE.read_text()):
        # the model of one's own is a copy of the embedded one
        command = command.replace("model.path=CHECKPOINT", f"model.path={embedded_path()}")
        shell = [sys.executable, "-c", command] if "\n" in command else ["bash", "-c", command]
        done = subprocess.run(
            shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    out = tmp_path / "outputs"
    divergence = {
        name: json.loads((out / name / "evaluation.json").read_text())["divergence"]["kl"]
        for name in ("tiny-globe", "watched-globe")
    }
    assert divergence["tiny-globe"] == pytest.approx(0.0123, rel=0.2)  # as the page says
    assert divergence["watched-globe"] == pytest.approx(0.0038, rel=0.2)
    assert (out / "sweep" / "report" / "report.html").is_file()
    assert len(list((out / "sweep").glob("*/evaluation.json"))) == 4
