"""`python -m globe.report`: the files it leaves, whatever the runs are like, and its sentences."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_support import STEPS, train

import globe.report as command
from globe.config.command_line import parse_options
from globe.config.commands import start
from globe.report import ReportOptions, report
from globe.reporting.markdown import escape
from globe.reporting.runs import ReportRun

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """What a browser would make of a page: balanced elements, references, tables, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.text = ""
        self._sort: str | None = None
        self._cell: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.references += [str(found[name]) for name in ("src", "href") if name in found]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables[str(found["id"])] = []
        elif tag == "tr":
            list(self.tables.values())[-1].append([])
        elif tag in ("td", "th"):
            self._cell, self._sort = "", found.get("data-sort")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            list(self.tables.values())[-1][-1].append((self._cell or "", self._sort))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell += data
        self.text += data


@pytest.fixture(scope="module")
def made(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the sweep."""
    out = tmp_path_factory.mktemp("report") / "out"
    report(ReportOptions(sweep=str(sweep), out=str(out), details=2))
    return out


def test_the_page_needs_nothing_but_itself(made: Path) -> None:
    page = Page((made / "report.html").read_text())
    images = [one for one in page.references if one.startswith("data:image/png;base64,")]
    assert len(images) == len(list(made.glob("*.png"))) >= 7
    assert all(base64.b64decode(one.partition(",")[2]).startswith(PNG) for one in images)
    rest = set(page.references) - set(images)
    assert all(one.startswith("#section-") or one == "data:," for one in rest)
    assert not re.search(r"https?://|@import|url\(", (made / "report.html").read_text())


def test_the_markdown_twin_shows_every_picture_and_says_the_same(made: Path) -> None:
    text = (made / "report.md").read_text()
    shown = re.findall(r"\]\(([^)]+)\)", text)
    assert sorted(shown) == sorted(one.name for one in made.glob("*.png"))
    page = Page((made / "report.html").read_text())
    titles = re.findall(r"^## (.+)$", text, flags=re.M)
    assert titles[:2] == ["Not finished", "Runs"]
    assert all(title in page.text for title in titles)
    for line in text.split("```")[0].splitlines():
        if line.startswith("|"):
            columns = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert columns in (5, len(page.tables["runs"][0]))


def test_the_table_sorts_by_numbers_and_marks_the_front(made: Path, runs: tuple[ReportRun, ...]) -> None:
    page = Page((made / "report.html").read_text())
    heads, *rows = page.tables["runs"]
    names = [name for name, _ in heads]
    assert len(rows) == 3
    for row, run in zip(rows, runs, strict=False):
        assert run.summary is not None
        assert row[names.index("kept of family")] == (f"{run.summary.kept:.1%}", str(run.summary.kept))
        assert float(row[names.index("RelFrob")][1] or "nan") == run.summary.relfrob
        assert row[names.index("perplexity")][0] in ("8.0000", "7.0000")
        assert row[names.index("steps")] == (str(STEPS), str(float(STEPS)))
    assert {row[names.index("codes.target_support")][0] for row in rows} == {"dense", "2"}
    assert "state" not in names  # all of them are finished


def test_runs_that_did_not_finish_are_listed_with_the_reason(made: Path) -> None:
    page = Page((made / "report.html").read_text())
    heads, *rows = page.tables["unfinished"]
    assert [name for name, _ in heads] == ["#", "run", "state", "banks done", "reason"]
    reasons = {row[1][0]: (row[2][0], row[4][0]) for row in rows}
    assert len(reasons) == 4
    assert reasons["a|b <i>"][1] == "it <script>alert(1)</script> broke | badly\nin two lines"
    assert reasons["deeper/killed"][0] == "running"
    assert any("n/5" in reason for _, reason in reasons.values())
    assert ("interrupted", "-") in reasons.values()
    assert "7 runs: 3 finished, " in page.text


def test_what_a_run_is_called_or_says_is_never_markup(made: Path) -> None:
    assert "<script>alert" not in (made / "report.html").read_text()
    text = (made / "report.md").read_text()
    assert "&lt;script>alert(1)&lt;/script> broke \\| badly in two lines" in text
    assert escape("a_b _c_ *d* `e` [f] # g |h|") == r"a_b \_c\_ \*d\* \`e\` \[f\] \# g \|h\|"


def test_the_csv_has_every_digit_of_every_bank(made: Path, runs: tuple[ReportRun, ...]) -> None:
    with (made / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["number"]) for line in lines] == [run.number for run in runs]
    for line, run in zip(lines[:3], runs, strict=False):
        assert run.summary is not None
        (bank,) = run.summary.banks
        assert float(line["relfrob"]) == bank.relfrob == float(line["run_relfrob"])
        assert (int(line["m"]), line["bank"], line["method"]) == (bank.m, "layer012.up", "globe")
        assert line["option.codes.target_support"] in ("", "2")
        assert float(line["perplexity"]) in (8.0, 7.0)
    assert {line["run_on_front"] for line in lines} == {"True", "False"}
    assert lines[3]["relfrob"] == lines[3]["m"] == ""


def test_equal_runs_give_equal_files_and_old_pictures_go(made: Path, sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "fig-codes-9.png").write_bytes(b"old")
    (out / "fig-own_picture.png").write_bytes(b"of the user")
    report(ReportOptions(sweep=str(sweep), out=str(out), details=2))
    names = {one.name for one in made.iterdir()}
    assert {one.name for one in out.iterdir()} == names | {"fig-own_picture.png"}
    assert all((out / name).read_bytes() == (made / name).read_bytes() for name in names)


def test_a_whole_model_has_layers_and_supports_and_no_front(tmp_path: Path) -> None:
    folder = train(tmp_path / "runs", "family=both", "layer=3-5", "bank.m=2")
    assert run_command_output(f"run={folder}", "details=1") == 0
    text = (folder / "report" / "report.md").read_text()
    for title in ("Banks", "Error and size", "Layers", "Supports of up and gate"):
        assert f"\n## {title}\n" in text
    assert "fig-layers.png" in text
    assert "fig-jaccard.png" in text
    assert "fig-front.png" not in text
    assert "Not evaluated yet" in text
    assert "Throughout: temperature = 1, lam = 0, beta = 1." in text
    assert text.count("layer004.gate") >= 1
    with (folder / "report" / "runs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6


def test_closed_forms_and_summaries_without_charts_are_said_to_be_so(tmp_path: Path) -> None:
    folder = train(tmp_path / "runs", "method=svd", "bank.m=2")
    summary = json.loads((folder / "summary.json").read_text())
    for bank in summary["banks"]:
        del bank["charts"]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert run_command_output(f"sweep={tmp_path / 'runs'}", f"out={tmp_path / 'out'}") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "closed forms take none" in text
    assert "hold neither codes nor spectra" in text
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_sweep_of_failures_only_is_reported_too(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "a|b <i>", tmp_path / "runs" / "one")
    assert run_command_output(f"sweep={tmp_path / 'runs'}") == 0
    assert "| 1 | one | failed | 0 |" in (tmp_path / "runs" / "report" / "report.md").read_text()


def run_command_output(*arguments: str) -> int:
    """The exit code of the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["globe.report", *arguments])
        try:
            start(command.main)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either sweep=FOLDER or run=FOLDER"),
        (["sweep=a", "run=b"], "give either sweep=FOLDER or run=FOLDER"),
        (["sweep=nowhere"], "sweep='nowhere' is not a folder"),
        (["sweep=empty"], "holds no run of globe.train"),
        (["run=empty"], "run='empty' is not the folder of a run"),
        (["sweep=empty", "details=-1"], "details=-1 is not possible"),
        (["sweep=empty", "details=many"], "give an integer"),
        (
            ["sweep=empty", "colour=red"],
            "colour is not an option: give one of sweep, run, out, details, title",
        ),
        (["empty"], "'empty' is not understood"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_1(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert run_command_output(*arguments) == 1
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert not list((tmp_path / "empty").iterdir())


def test_without_matplotlib_the_extra_is_named(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_command_output(f"sweep={sweep}", f"out={tmp_path / 'out'}") == 1
    assert "pip install 'globe-moe[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_output("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n{one.name}=" in text for one in fields(ReportOptions))
    assert parse_options(ReportOptions, ["sweep=a"]).details == 4


def test_the_command_says_what_it_wrote(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_output(f"sweep={sweep}", f"out={tmp_path / 'out'}", "details=0", "title=Mine") == 0
    assert "7 runs, 4 of them not finished; report.html, report.md, runs.csv" in capsys.readouterr().out
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# Mine\n")
    assert "Left out, as details=0 asks for." in text
