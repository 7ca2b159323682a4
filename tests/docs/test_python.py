"""The examples of docs/python.md and of the docstrings of the Python interface do what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
from test_docs import ROOT, code_blocks


@pytest.fixture(autouse=True)
def _in_a_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [
        code
        for language, code in code_blocks((ROOT / "docs" / "python.md").read_text())
        if language == "python"
    ]
    assert len(blocks) > 6
    names: dict[str, object] = {}
    for code in blocks:
        exec(compile(code, "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "Bank(n=16, p=48, d=64, m=4, r=24, kept=0.5013, relfrob=0.3" in printed
    assert "bank.m=99 is more than the 16 experts" in printed
    assert (tmp_path / "outputs" / "mine" / "banks" / "layer012.up" / "bank.safetensors").is_file()


@pytest.mark.parametrize("module", ["globe.sizes.interface", "globe.bank.learned", "globe.hf.compress"])
def test_docstring_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert found.attempted >= 2
    assert found.failed == 0
