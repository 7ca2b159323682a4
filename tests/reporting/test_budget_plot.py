"""The picture of one budget over many banks, where it is drawn and what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_support import train

from globe.reporting import budget_plot
from globe.reporting.plot import Picture
from globe.reporting.runs import read_run
from globe.reporting.sections import build
from globe.runs.allocation import Allocation, Share, read_allocation, write_allocation

FOUND = Allocation(
    0.5,
    True,
    (
        Share("layer003.up", 700, 0.35, 0.02, 0.03, 0.02),
        Share("layer003.gate", 700, 0.15, 0.001, 0.004, 0.001),
        Share("layer004.up", 700, 1.0, 0.3, 0.0, 0.3),
    ),
)


def test_the_bars_are_the_shares_and_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    shown: list[Any] = []

    def picture(name: str, title: str, caption: str, make: Any, **layout: Any) -> Picture:
        shown.append(Figure().subplots(2, 1, squeeze=False))
        make(shown[0][0, 0].figure, shown[0])
        return Picture(name, title, caption, b"", b"")

    monkeypatch.setattr(budget_plot, "picture", picture)
    caption = budget_plot.budget_picture(FOUND).caption
    above, below = shown[0][:, 0]
    assert [bar.get_height() for bar in above.patches] == [0.35, 0.15, 1.0]
    assert above.lines[0].get_ydata()[0] == 0.5
    assert [bar.get_height() for bar in below.patches] == [0.02, 0.001, 0.3, 0.03, 0.004, 0.0]
    assert [text.get_text() for text in below.get_xticklabels()] == [one.key for one in FOUND.shares]
    assert "50.0% of all numbers kept; predicted loss 0.034 instead of 0.321. 1 of the banks stay" in caption


def test_a_report_shows_it(tmp_path: Path) -> None:
    folder = train(tmp_path, "bank.m=2")
    assert not any(
        one.title.startswith("Budget") for one in build([read_run(folder, folder)], "", details=0).sections
    )
    write_allocation(FOUND, folder / "allocation.json", fingerprint="a")
    report = build([read_run(folder, folder)], "", details=0)
    (section,) = (one for one in report.sections if one.title == "Budget over layers and families")
    assert section.pictures[0].png[:4] == b"\x89PNG"
    assert not section.pictures[0].caption.startswith(":")


def test_a_file_is_read_as_it_was_written_and_a_damaged_one_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "allocation.json"
    assert read_allocation(file) is None
    write_allocation(FOUND, file, fingerprint="a")
    assert read_allocation(file) == read_allocation(file, fingerprint="a") == FOUND
    assert read_allocation(file, fingerprint="b") is None
    record = json.loads(file.read_text())
    for key, value in (("kept", 1.5), ("kept", "0.5"), ("key", "a\x1bb"), ("parameters", 0), ("loss", None)):
        damaged = json.loads(file.read_text())
        damaged["shares"][0][key] = value
        other = tmp_path / "damaged.json"
        other.write_text(json.dumps(damaged))
        assert read_allocation(other) is None
    (tmp_path / "none.json").write_text(json.dumps(record | {"shares": []}))
    assert read_allocation(tmp_path / "none.json") is None
