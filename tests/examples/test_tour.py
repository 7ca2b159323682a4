"""`examples/tour.ipynb`: its cells run from top to bottom and show what their text says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    record = json.loads(NOTEBOOK.read_text())
    assert record["nbformat"] == 4
    return [cell for cell in record["cells"] if cell["cell_type"] == kind]


def test_the_cells_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    try:
        for number, cell in enumerate(cells("code")):
            exec(compile("".join(cell["source"]), f"cell {number} of tour.ipynb", "exec"), names)
        assert len(plt.get_fignums()) == 2
    finally:
        plt.close("all")
    assert min(names["errors"], key=names["errors"].__getitem__) == "GloBE"
    assert names["by_hand"] == pytest.approx(names["bank"].relfrob, rel=1e-3)
    errors = [one.relfrob for one in names["banks"]]
    assert errors == sorted(errors, reverse=True)
    assert names["model"].num_parameters() < names["original"].num_parameters()
    # 1.0036, and 1.0032 under other arithmetic: the compressed model is no better, by more than rounding makes
    assert 0.99 * names["before"] < names["after"] < 1.5 * names["before"]
    printed = capsys.readouterr().out
    assert "perplexity " in printed
    assert "The old man" in printed


def test_it_is_stored_without_outputs_and_its_links_resolve() -> None:
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells("code"))
    text = "\n".join("".join(cell["source"]) for cell in cells("markdown"))
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 2
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link
