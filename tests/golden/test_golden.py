"""Small float64 fits give the numbers they gave when the trace was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from globe.numerics import chunks
from scripts import load_script

_FILE = Path(__file__).with_name("make_trace.py")
make_trace = load_script(_FILE, "make_trace")

CASES = make_trace.cases()
PLAIN = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX")
"""Without vector units PyTorch rounds the float32 draws of the preconditioner's sketch otherwise, and truncated
conjugate gradients show it."""
GOLDEN = json.loads(make_trace.FILE.read_text(encoding="utf-8"))


def test_the_trace_holds_every_case_and_no_other() -> None:
    assert set(GOLDEN) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_fit_gives_the_numbers_of_its_trace(name: str) -> None:
    assert make_trace.trace(*CASES[name]) == pytest.approx(GOLDEN[name], rel=2e-6 if PLAIN else 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_sums_in_another_order_stay_well_within_the_tolerance(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of four experts round otherwise, as another machine does."""
    monkeypatch.setattr(chunks, "CHUNK_NUMBERS", 1)
    assert make_trace.trace(*CASES[name]) == pytest.approx(GOLDEN[name], rel=2e-6 if PLAIN else 1e-10)
