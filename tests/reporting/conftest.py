"""One sweep, made once: the tests read it and leave it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_support import make_sweep

from globe.reporting.runs import ReportRun, read_runs


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("made") / "sweep")


@pytest.fixture(scope="session")
def runs(sweep: Path) -> tuple[ReportRun, ...]:
    return read_runs(sweep, key="sweep")
