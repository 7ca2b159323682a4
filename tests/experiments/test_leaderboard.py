"""The leaderboard: which rows there are, which are on the front, what is measured again, and the table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from globe.config.composition import to_config
from run_support import composed
from scripts import load_script

FILE = Path(__file__).parents[2] / "experiments" / "leaderboard" / "board.py"


@pytest.fixture(scope="module")
def board() -> Any:
    return load_script(FILE, "leaderboard")


@pytest.fixture(scope="module")
def pages() -> Any:
    return load_script(FILE.with_name("pages.py"), "leaderboard_pages")


def point(size: int, kl: float, **more: Any) -> dict[str, Any]:
    figures = {"perplexity": 50.0, "perplexity_original": 49.0, "top1": 0.9, "relfrob": 0.3, "seconds": 1.0}
    figures |= {
        "memory_mib": 300.0,
        "kl_low": kl / 2,
        "kl_high": 2 * kl,
        "share": size / 100,
        "bits": 16 * size / 100,
    }
    own = {"model": "m", "method": f"at {size}", "size": "s", "options": ["a=1"], "tokens": 10, "text": "t"}
    own["kind"] = "weights"
    return own | figures | {"bytes": size, "kl": kl} | more


@pytest.mark.parametrize("calibrated", [False, True])
def test_every_row_is_a_run_that_composes_and_none_is_there_twice(board: Any, calibrated: bool) -> None:
    rows = board.rows(calibrated=calibrated)
    assert len({(row.method, row.size) for row in rows}) == len(rows) > 12
    assert any(row.pruned for row in rows) == calibrated
    text = ["calibrate.text=embedded"] if calibrated else []
    for row in rows:
        to_config(composed("family=all", "layer=all", *row.options, *text))


def test_every_method_has_a_colour_of_its_own(board: Any, pages: Any) -> None:
    methods = {row.method for calibrated in (False, True) for row in board.rows(calibrated=calibrated)}
    assert methods == set(pages.STYLES)
    assert len({colour for colour, _ in pages.STYLES.values()}) == len(methods)


def test_front_is_what_nothing_smaller_equals(pages: Any) -> None:
    points = [point(5, 0.4), point(3, 0.6), point(4, 0.7), point(9, 0.1), point(5, 0.5), point(9, 0.1)]
    assert [(one["bytes"], one["kl"]) for one in pages.front(points)] == [(3, 0.6), (5, 0.4), (9, 0.1)]


def test_a_row_is_measured_again_when_its_options_or_text_change(board: Any) -> None:
    row = board.Row("at 3", "s", ("a=1",))
    setting = {"tokens": 10, "text": "t"}
    assert board.measured([point(3, 0.5)], "m", row, setting)
    assert not board.measured([point(3, 0.5)], "other", row, setting)
    assert not board.measured([point(3, 0.5, options=["a=2"])], "m", row, setting)
    assert not board.measured([point(3, 0.5)], "m", row, {"tokens": 20, "text": "t"})


def test_a_row_that_is_refused_stops_no_other_and_rows_of_others_stay(
    board: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [board.Row("too small", "s", ("a=1",)), board.Row("at 3", "s", ("a=1",))]
    figures = {key: value for key, value in point(3, 0.5).items() if key not in ("model", "method", "kind")}

    def found(bench: Any, row: Any, *_: Any) -> dict[str, Any] | None:
        board.write_json(board.RESULTS, [point(9, 0.1, model="of another command")])
        return None if row.method == "too small" else dict(figures)

    class Bench:
        name = "m"

        def measure(self, run: None) -> dict[str, float]:
            return {"perplexity": 49.0}

    monkeypatch.setattr(board, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(board, "rows", lambda calibrated: rows)
    monkeypatch.setattr(board, "row_figures", found)
    given = argparse.Namespace(tokens=10, first=0, text=Path("t"), only="", runs=tmp_path)
    board.measure_kind(Bench(), "weights", given)
    assert [(one["model"], one["method"]) for one in board.read_results()] == [
        ("of another command", "at 9"),
        ("m", "at 3"),
    ]
    assert "m too small s: no row" in capsys.readouterr().out


def test_table_and_picture_show_every_row(pages: Any, tmp_path: Path) -> None:
    results = [point(5, 0.4), point(3, 0.6), point(6, 0.7), point(3, 0.2, model="n")]
    results += [point(4, 0.1, kind="calibrated"), point(50, 0.2, kind="calibrated", relfrob=None)]
    text = pages.table(results)
    assert text.index("## m, all three families") < text.index("## m, up and gate") < text.index("## n")
    assert "- | - | - |" in text
    weights = text[text.index("## m, up and gate") :]
    assert weights.index("at 3") < weights.index("at 5") < weights.index("at 6")
    assert "**at 5**" in weights
    assert "**at 6**" not in weights
    pages.draw(results, tmp_path / "front.svg")
    assert "<svg" in (tmp_path / "front.svg").read_text()


def test_pages_are_those_of_the_results(board: Any, pages: Any) -> None:
    results = board.read_results()
    assert pages.TABLE.read_text() == pages.table(results)
    readme = pages.README.read_text()
    assert readme == pages.with_summary(readme, results)


def test_summary_is_the_least_within_a_share(pages: Any) -> None:
    rows = [
        point(12, 0.4, method="GPTQ"),
        point(11, 0.3, method="GPTQ, rotated"),
        point(18, 0.5, method="GPTQ"),
    ]
    rows += [point(14, 0.1, method="GloBE, one square atom"), point(50, 0.01, method="pruned by REAP")]
    text = pages.summary([one | {"kind": "calibrated"} for one in rows] + [point(5, 0.001, method="GPTQ")])
    lines = [line.split(" | ") for line in text.splitlines()[2:]]
    assert [line[0] for line in lines] == [f"| `m`: {title}" for title in pages.SUMMARY]
    assert lines[0][1:3] == ["-", "**0.10000**"]
    assert lines[2][1:4] == ["**0.30000**", "0.30000", "0.30000"]
    bare = pages.summary([rows[-1] | {"kind": "calibrated"}])
    assert bare.splitlines()[2].endswith("| - | - | - | - | - |"), "a model of no other rows"
    assert pages.with_summary("a\n" + "".join(pages.MARKS) + "z\n", []).endswith(pages.MARKS[1] + "z\n")
