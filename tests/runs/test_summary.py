"""The summary: its figures, its file, its table."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from globe.runs.chart_data import BankCharts
from globe.runs.summary import BankReport, BankRuntime, RunSummary, print_summary, read_summary

REPORT = BankReport(
    key="layer003.up",
    n=6,
    p=5,
    d=7,
    m=2,
    r=3,
    target_support=None,
    parameters=210,
    kept_parameters=144,
    relfrob_start=0.6,
    relfrob_fit=0.29,
    relfrob=0.3,
    export_dtype="bfloat16",
    stop="all steps were taken (train.steps)",
    steps=20,
    accepted=19,
    rejected=1,
    regularised_solves=0,
    seed=2**62 + 1,
    attempt=0,
    supports=(1, 2, 2, 2, 1, 1),
    atom_usage=(4, 5),
    expert_relfrob=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    metrics={"mse": 0.09, "code_condition": None},
    charts=BankCharts((0, 5), (0, 1), ((1.0, 0.0), (0.25, 0.75)), (0, 5), (1, 5), (2.5, 0.1), (2.4, 0.0)),
)
RUNTIME = BankRuntime(1.5, 2.0, 0.1, 1.0, 0.2, 13.3, 3.0, 1e6, 200 * 2**20, None)


def summary_of(*reports: BankReport, failed: dict[str, str] | None = None) -> RunSummary:
    return RunSummary(
        name="a-run",
        source={"id": "globe-tiny", "revision": None, "model_type": "qwen2_moe"},
        stamp="",
        total_parameters=10_000,
        device="cpu",
        banks=reports,
        runtimes={report.key: RUNTIME for report in reports},
        failed=failed or {},
        seconds=3.0,
    )


def printed(summary: RunSummary, folder: Path = Path("outputs/a-run"), width: int = 80) -> str:
    stream = StringIO()
    print_summary(summary, folder, Console(file=stream, width=width))
    return stream.getvalue()


def test_kept_has_both_denominators() -> None:
    second = replace(REPORT, key="layer003.gate", kept_parameters=66, relfrob=0.5)
    summary = summary_of(REPORT, second)
    assert REPORT.kept == pytest.approx(144 / 210)
    assert summary.kept == pytest.approx((144 + 66) / 420)
    assert summary.kept_model() == pytest.approx((10_000 - 420 + 210) / 10_000)
    assert summary.kept_model([second]) == pytest.approx((10_000 - 210 + 66) / 10_000)
    assert summary.relfrob == pytest.approx(0.4)


def test_the_file_gives_the_summary_back(tmp_path: Path) -> None:
    summary = summary_of(REPORT, failed={"layer004.up": "broke"})
    (tmp_path / "summary.json").write_text(json.dumps(summary.to_dict(), allow_nan=False))
    assert read_summary(tmp_path / "summary.json") == summary


def test_a_summary_without_charts_is_still_read(tmp_path: Path) -> None:
    """Those of earlier versions have none, and their artefacts are not to be learned anew for it."""
    summary = summary_of(REPORT)
    record = summary.to_dict()
    del record["banks"][0]["charts"]
    (tmp_path / "summary.json").write_text(json.dumps(record))
    assert read_summary(tmp_path / "summary.json") == replace(summary, banks=(replace(REPORT, charts=None),))


@pytest.mark.parametrize("change", [{"format_version": 99}, {"banks": [{}]}, {"name": None, "device": 3}])
def test_a_file_of_another_version_is_said_and_counts_as_none(
    tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    record = summary_of(REPORT).to_dict() | change
    if "device" in change:
        del record["device"]
    (tmp_path / "summary.json").write_text(json.dumps(record))
    assert read_summary(tmp_path / "absent.json") is None
    assert not caplog.text
    assert read_summary(tmp_path / "summary.json") is None
    assert f"{tmp_path / 'summary.json'} is ignored, it is damaged or of another version" in caplog.text


def test_a_run_without_a_bank_is_plain_json_too() -> None:
    empty = summary_of(failed={"layer004.up": "broke"})
    assert math.isnan(empty.relfrob)
    record = json.loads(json.dumps(empty.to_dict(), allow_nan=False))
    assert (record["relfrob"], record["kept"], record["kept_model"]) == (None, None, 1.0)
    assert "layer004.up failed: broke" in printed(empty)


def test_the_table_of_one_bank_tells_all() -> None:
    text = printed(summary_of(REPORT))
    for part in ("layer003.up", "6 x 5 x 7", "68.6%", "99.3%", "0.6000", "0.3000", "1.5", "20", "200 MiB"):
        assert part in text, part
    assert "artefact: outputs/a-run/banks/layer003.up" in text
    assert "144 of 210 parameters kept" in text
    assert "all 1" not in text


def test_the_table_of_48_banks_has_a_row_each_and_a_total() -> None:
    reports = [replace(REPORT, key=f"layer{layer:03d}.{f}") for layer in range(24) for f in ("up", "gate")]
    text = printed(summary_of(*reports))
    assert sum("layer" in line for line in text.splitlines()) == 48
    (total,) = [line for line in text.splitlines() if "all 48" in line]
    assert "68.6%" in total
    assert "288 experts" in total
    assert "banks/<bank>" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_failed_banks_are_named_in_one_sentence() -> None:
    one = summary_of(REPORT, failed={"layer004.up": "broke"})
    assert one.failure == "layer004.up failed: broke"
    two = summary_of(REPORT, failed={"layer004.up": "broke", "layer005.up": "too"})
    assert two.failure.startswith("2 of 3 banks failed (layer004.up, layer005.up)")
    row = next(line for line in printed(two).splitlines() if "layer005.up" in line)
    assert "failed" in row


def test_a_report_is_plain_json_with_what_a_reader_wants() -> None:
    record = json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))
    assert record["support_median"] == 1.5
    assert record["kept"] == pytest.approx(144 / 210)
    assert BankReport.from_dict(record) == REPORT
    assert BankRuntime(**asdict(RUNTIME)) == RUNTIME
