"""`python -m globe.report`: the files it leaves, whatever the runs are like, and its sentences."""

from __future__ import annotations

import base64
import csv
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from report_support import STEPS, train

import globe.report as command
from globe.config.command_line import parse_options
from globe.config.commands import start
from globe.config.composition import conf_dir, register, to_config
from globe.errors import ConfigError
from globe.report import ReportOptions, report
from globe.reporting.documents import escape_latex, escape_markdown, to_csv
from globe.reporting.plot import DARK, ON_DARK, ON_LIGHT
from globe.reporting.publish import MANIFEST, publish
from globe.reporting.runs import ReportRun, read_runs
from globe.reporting.sections import references_command

register()
VOID = {"meta", "link", "img", "wbr"}


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
    images = [one for one in page.references if one.startswith("data:image/svg+xml;base64,")]
    assert len(images) == len(list(made.glob("*.png"))) >= 7
    assert all(base64.b64decode(one.partition(",")[2]).startswith(b"<?xml") for one in images)
    rest = set(page.references) - set(images)
    assert all(one.startswith("#section-") or one in ("data:,", "#top") for one in rest)
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
        assert row[names.index("folder")][0] == run.name
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
    assert reasons["a|b <i>"][1] == "it <script>alert(1)</script> broke | badly in two lines"
    assert reasons["deeper/killed"][0] == "running"
    assert any("this fit broke" in reason for _, reason in reasons.values())
    assert ("interrupted", "-") in reasons.values()
    assert "7 runs: 3 finished, " in page.text


def test_what_a_run_is_called_or_says_is_never_markup(made: Path) -> None:
    assert "<script>alert" not in (made / "report.html").read_text()
    text = (made / "report.md").read_text()
    assert "&lt;script>alert(1)&lt;/script> broke \\| badly in two lines" in text
    assert escape_markdown("a_b _c_ *d* `e` [f] # g |h|") == r"a_b \_c\_ \*d\* \`e\` \[f\] \# g \|h\|"


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
    report(ReportOptions(sweep=str(sweep), out=str(out), details=3))
    assert (out / "fig-codes-3.png").exists()
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
    assert f"model={folder}" in text[text.index("Not evaluated yet") :].splitlines()[0].replace("\\", "")
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
        (["empty"], "sweep='empty' holds no run"),
        (["empty", "word"], "'word' is not understood"),
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
    assert "7 runs, 4 of them not finished; report.html, report.md, tables" in capsys.readouterr().out
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# Mine\n")
    assert "Left out, as details=0 asks for." in text


def test_what_no_report_has_listed_is_neither_replaced_nor_removed(sweep: Path, tmp_path: Path) -> None:
    """`out=` removed every fig-*.png of a user and wrote over report.html and runs.csv."""
    for name in ("report.html", "runs.csv", "fig-front.png", MANIFEST):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_bytes(b"mine")
        (out / "fig-old-1.png").write_bytes(b"mine too")
        assert run_command_output(f"sweep={sweep}", f"out={out}", "details=0") == 1
        assert {one.name: one.read_bytes() for one in out.iterdir()} == {
            name: b"mine",
            "fig-old-1.png": b"mine too",
        }


def test_a_report_replaces_its_own_files_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, {"a.txt": b"1", "b.txt": b"2", "c.txt": b"3"})
    (out / "b.txt").write_bytes(b"changed by hand")
    (out / "notes.md").write_bytes(b"mine")
    publish(out, {"a.txt": b"4"})
    assert {one.name: one.read_bytes() for one in out.iterdir() if one.name != MANIFEST} == {
        "a.txt": b"4", "b.txt": b"changed by hand", "notes.md": b"mine",
    }  # fmt: skip
    assert list(json.loads((out / MANIFEST).read_text())["files"]) == ["a.txt"]
    outside = tmp_path / "outside"
    outside.write_bytes(b"elsewhere")
    (out / "a.txt").unlink()
    (out / "a.txt").symlink_to(outside)
    with pytest.raises(ConfigError, match="is no file but something else"):
        publish(out, {"a.txt": b"5"})
    assert outside.read_bytes() == b"elsewhere"
    record = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(record | {"files": {"../outside": record["files"]["a.txt"]}}))
    with pytest.raises(ConfigError, match="has listed it"):
        publish(out, {"z.txt": b"6"} | {"notes.md": b"7"})
    assert outside.exists()


def test_the_environment_and_control_codes_never_reach_a_report(
    sweep: Path, runs: tuple[ReportRun, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("SECRET", "hunter2")
    for at, run in enumerate(runs[:2]):
        copy = tmp_path / "runs" / f"{at}\x1b[31m[bold]=1+1"
        shutil.copytree(sweep / run.name, copy)
        with (copy / "config.yaml").open("a") as file:
            file.write("secret: ${oc.env:SECRET}\nbroken: ${\n")
            file.write(f'formula: "=cmd|{at}"\nescape: "\\e[2J{at}"\n')
    assert run_command_output(f"sweep={tmp_path / 'runs'}", f"out={tmp_path / 'out'}") == 0
    for file in (tmp_path / "out").glob("*.[hmct]*"):
        text = file.read_text()
        assert "hunter2" not in text
        assert "\x1b" not in text
    with (tmp_path / "out" / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["option.formula"] for line in lines] == ["'=cmd|0", "'=cmd|1"]
    assert "\x1b" not in capsys.readouterr().out
    assert "${oc.env:SECRET}" in (tmp_path / "out" / "report.md").read_text()


def test_csv_and_latex_say_what_a_cell_says() -> None:
    records = [{"a": "=1", "b": -2.5, "c": "-x"}, {"a": "@y", "b": None, "c": ["=z"]}]
    assert to_csv(records) == "a,b,c\n'=1,-2.5,'-x\n'@y,,['=z']\n"
    assert escape_latex(r"50 % of a_b & {c} \ #1 ~ ^") == (
        r"50 \% of a\_b \& \{c\} \textbackslash{} \#1 \textasciitilde{} \textasciicircum{}"
    )


def test_latex_and_csv_tables_are_those_of_the_page(made: Path, runs: tuple[ReportRun, ...]) -> None:
    tex = (made / "table-runs.tex").read_text()
    body = tex.split("\\endhead\n")[1].split("\\bottomrule")[0]
    columns = len(Page((made / "report.html").read_text()).tables["runs"][0])
    assert [line.count(" & ") for line in body.splitlines()] == [columns - 1] * 3
    assert body.splitlines()[0].startswith("\\textbf{1}")
    with (made / "table-runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line, run in zip(lines, runs, strict=False):
        assert run.summary is not None
        assert float(line["RelFrob"]) == run.summary.relfrob
    assert {one.stem for one in made.glob("*.svg")} == {one.stem for one in made.glob("*.png")}


def test_columns_are_explained_and_the_page_has_its_dark_form(made: Path) -> None:
    text = (made / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text
    assert re.search(r'<th scope="col" class="number" title="[^"]*Frobenius', text)
    assert "What the columns mean" in text
    page = Page(text)
    assert all(f"#section-{at}" in page.references for at in range(1, text.count("<section>") + 1))


def test_runs_that_differ_in_their_cache_alone_share_a_row_and_seeds_a_mean(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for seed in (1, 2):
        first = train(root, "bank.m=2", f"seed={seed}")
    twin = Path(shutil.copytree(first, root / "twin"))
    summary = json.loads((twin / "summary.json").read_text())
    (twin / "summary.json").write_text(json.dumps(summary | {"S_cache": 4}))
    found, built, _ = report(ReportOptions(sweep=str(root), details=0))
    tables = {table.name: table for table in built.tables}
    headings = [column.heading for column in tables["runs"].columns]
    caches = sorted(row[headings.index("S_cache")].text for row in tables["runs"].rows)
    assert len(caches) == 2
    assert {"4", "all"} == set(", ".join(caches).split(", "))
    assert "1 more differ" in built.introduction[0]
    (row,) = tables["seeds"].rows
    assert [cell.text for cell in row[:2]] == ["#1, #2", "2"]
    errors = [run.summary.relfrob for run in found if run.summary]
    assert row[2].value == pytest.approx(sum(errors) / 2)
    assert row[3].value == pytest.approx(abs(errors[0] - errors[1]) / 2**0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda bank: bank.update(relfrob="<b>"),
        lambda bank: bank.update(m=10**400),
        lambda bank: bank.update(supports=[]),
        lambda bank: bank["charts"].update(code_shares=[[1], [2, 3]]),
        lambda bank: bank["charts"].update(code_atoms=[99]),
        lambda bank: bank.update(metrics=[1]),
        lambda bank: bank.update(key=["layer"]),
        lambda bank: bank.update(expert_relfrob=[0.5]),
        lambda bank: bank.update(runtime={"seconds": "long"}),
    ],
)
def test_one_bad_run_is_listed_and_the_others_are_reported(
    change: Callable[[dict[str, Any]], None], sweep: Path, runs: tuple[ReportRun, ...], tmp_path: Path
) -> None:
    for run in runs[:2]:
        shutil.copytree(sweep / run.name, tmp_path / "runs" / run.name)
    file = tmp_path / "runs" / runs[0].name / "summary.json"
    summary = json.loads(file.read_text())
    change(summary["banks"][0])
    file.write_text(json.dumps(summary))
    found, built, _ = report(ReportOptions(sweep=str(tmp_path / "runs"), details=2))
    assert [run.measured for run in found] == [True, False]
    (trouble,) = [table for table in built.tables if table.name == "unfinished"]
    assert trouble.rows[0][1].text == runs[0].name
    assert "damaged" in trouble.rows[0][4].text


def test_files_that_are_no_files_and_bombs_of_aliases_end_no_report(
    sweep: Path, runs: tuple[ReportRun, ...], tmp_path: Path
) -> None:
    import os

    copies = [
        Path(shutil.copytree(sweep / run.name, tmp_path / "runs" / f"{at}"))
        for at, run in enumerate(runs[:3])
    ]
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{at}: &a{at} [*a{at - 1}, *a{at - 1}]\n" for at in range(1, 40))
    (copies[0] / "config.yaml").write_text(bomb)
    (copies[1] / "config.yaml").unlink()
    os.mkfifo(copies[1] / "config.yaml")
    (copies[2] / "metrics.jsonl").write_text("[" * 100_000 + "\n" + '{"bank": "x", "relfrob": 1e999}\n')
    found, _, _ = report(ReportOptions(sweep=str(tmp_path / "runs"), details=0))
    assert [bool(run.options) for run in found] == [False, False, True]


def test_every_colour_has_a_form_for_dark_pages(made: Path) -> None:
    """Pictures were inverted whole on dark pages, maps of colours with them."""
    maps = {"codes": True, "sizes": False}
    for file in made.glob("*.svg"):
        drawn = file.read_text()
        sheet, _, rest = drawn.partition("</style>")
        used = set(re.findall(r"(?:fill|stroke): (#\w+)", rest))
        assert used <= {*DARK, ON_LIGHT, ON_DARK}, file.name
        assert used & set(DARK), file.name
        assert "prefers-color-scheme:dark" in sheet
        kind = next((one for one in maps if one in file.name), None)
        assert ("image{filter" in sheet) is (kind is not None and maps[kind]), file.name
    light = [one for one in DARK if one not in ("#ffffff", "#222222", "#e3e3e3", "#bdbdbd")]
    assert all(_contrast(DARK[one], DARK["#ffffff"]) > 4.5 for one in light)


def _contrast(first: str, second: str) -> float:
    """The contrast of two colours as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
        return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_the_report_says_the_command_that_adds_lines_of_reference(sweep: Path, made: Path) -> None:
    text = (made / "report.md").read_text()
    (said,) = re.findall(r"python -m globe.train (experiment=references .*?), and this", text)
    inside = references_command(read_runs(sweep, key="sweep")[:1], Path(sweep.name))
    assert f"output=. sweep={sweep.name} " in inside
    words = shlex.split(said)
    assert words[1:3] == [f"output={sweep.parent}", f"sweep={sweep.name}"]
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        config = to_config(compose("config", overrides=[*words, "method=svd", "bank.kept=0.4"]))
    known = read_runs(sweep, key="sweep")[0].options
    assert config.model.max_experts == known["model.max_experts"] == 6
    assert str(config.family) == known["family"]
    assert config.layer == known["layer"]
