"""What is said of a bank when it is done."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from run_support import load, run_in

FEW = ("train.steps=2", "model.max_experts=6", "bank.m=2", "bank.r=7")


@pytest.mark.parametrize("metric", ["none", "experts"])
def test_start_and_end_are_compared_in_one_metric(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], metric: str
) -> None:
    with caplog.at_level(logging.INFO):
        _, folder = run_in(tmp_path, f"normalise.metric={metric}", *FEW)
    (bank,) = load(folder / "summary.json")["banks"]
    start, end = bank["relfrob_start"], bank["relfrob"]
    row = next(line for line in capsys.readouterr().out.splitlines() if "\u2502 layer012.up" in line)
    if metric == "none":
        assert f"RelFrob {start:.4f} -> {end:.4f}, " in caplog.text
        assert f"{start:.4f}" in row
    else:
        seen = bank["metrics"]["relfrob_metric"]
        assert abs(seen - end) > 1e-3, "else the test could not tell them apart"
        assert f"RelFrob {end:.4f} ({start:.4f} -> {seen:.4f} in the metric of the fit), " in caplog.text
        assert f"{start:.4f}" not in row
