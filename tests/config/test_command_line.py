"""What is typed after a command: paths as they are, other values as YAML, nothing else."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import pytest
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from globe.calibrate import CalibrateOptions
from globe.config.command_line import parse_options, path_option, run_command
from globe.config.commands import explain
from globe.config.console import add_row, new_table, progress_bar, say, show_table, wide_console
from globe.errors import CheckpointError, ConfigError
from globe.evaluation.options import EvaluateOptions
from globe.inspect import InspectOptions
from globe.patch import PatchOptions
from globe.report import ReportOptions

ODD = (
    "2026_11_29",
    "0123",
    "1e3",
    "true",
    "~",
    "a #2",
    " a",
    "a: b",
    "[a]",
    "{a}",
    "${oc.env:HOME}",
    "a=b",
    "'q'",
    "-",
    "null ",
)


class Form(StrEnum):
    one = "one"
    two = "two"


@dataclass
class Inner:
    path: str | None = path_option(None)
    count: int = 1


@dataclass
class Options:
    out: str = path_option()
    title: str | None = None
    form: Form = Form.one
    cache: int | str | None = None
    names: list[str] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize("typed", ODD)
def test_a_path_is_what_was_typed(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    expected = "/home/me" if typed == "~" else typed
    found = parse_options(Options, [f"out={typed}", f"inner.path={typed}", f"title={typed}"])
    assert (found.out, found.inner.path, found.title) == (expected, expected, typed)


@pytest.mark.parametrize(
    ("kind", "required", "keys"),
    [
        (PatchOptions, ["run=r", "out=o"], ["run", "out", "model.path", "model.revision"]),
        (ReportOptions, [], ["sweep", "run", "out", "title"]),
        (InspectOptions, ["path=p"], ["path", "revision"]),
        (EvaluateOptions, ["model=m"], ["model", "against", "text", "tokenizer", "include_path", "out"]),
    ],
)
def test_every_command_takes_its_paths_as_typed(kind: type, required: list[str], keys: list[str]) -> None:
    for key in keys:
        found = parse_options(kind, [*required, f"{key}=2026_11_29 #1"])
        for name in key.split("."):
            found = getattr(found, name)
        assert found == "2026_11_29 #1"


def test_other_values_are_yaml_and_checked() -> None:
    found = parse_options(Options, ["out=o", "form=two", "cache=3", "names=[a,b]", "inner.count=0x10"])
    assert found == Options("o", None, Form.two, 3, ["a", "b"], Inner(None, 16))
    assert parse_options(Options, ["out=o", "title=null", "inner.path=null"]).title is None
    for wrong in ("form=three", "inner.count=many", "colour=red", "inner.colour=red"):
        with pytest.raises((ConfigError, OmegaConfBaseException)) as caught:
            parse_options(Options, ["out=o", wrong])
        assert wrong.partition("=")[0] in str(explain(caught.value))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "out is missing: give out="),
        (["title=x"], "out is missing: give out="),
        (["out="], "out= is empty"),
        (["out=o", "inner=x"], "is a group of options: give inner.KEY=VALUE"),
        (["out=o", "word"], "'word' is not understood"),
        (["out=~nobody-of-that-name/x"], "there is no such home folder"),
        (["out=a\0b"], "null character"),
    ],
)
def test_what_can_not_be_is_said(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_options(Options, arguments)


def test_the_first_argument_may_be_a_path_alone() -> None:
    def first(*typed: str) -> str:
        return parse_options(Options, list(typed), positional="out").out

    assert first("plain/folder", "title=x") == "plain/folder"
    assert first("/a=b/m") == "/a=b/m"
    assert first("./a=b") == "./a=b"
    assert first("out=a=b") == "a=b"


@pytest.mark.parametrize("typed", ["model=a=b", "model.path=a=b"])
def test_the_model_has_one_name_in_every_command(typed: str) -> None:
    assert parse_options(PatchOptions, ["run=r", "out=o", typed]).model.path == "a=b"
    assert parse_options(InspectOptions, [typed], positional="path").path == "a=b"
    assert parse_options(CalibrateOptions, [typed, "text=t"]).model == "a=b"
    assert parse_options(EvaluateOptions, [typed]).model == "a=b"


def test_help_is_printed_and_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["globe.x", "out=o", "--help"])
    ran: list[Options] = []
    run_command("how to", Options, ran.append)
    assert (ran, capsys.readouterr().out) == ([], "how to\n")
    monkeypatch.setattr(sys, "argv", ["globe.x", "out=o"])
    run_command("how to", Options, ran.append)
    assert ran == [Options("o")]


def test_what_comes_from_a_file_neither_colours_nor_moves_the_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=60, color_system="truecolor")
    table = new_table("a [red]title\x1b[2J", ("name", "size"))
    add_row(table, ("[bold]x[/bold]\x1b[31m\nnext", "1\u202e2"))
    console.print(table)
    say(console, "[link=http://x]word[/link]\x07\r\ud800")
    shown = stream.getvalue()
    assert "[bold]x[/bold]\\x1b[31m next" in shown
    assert "1\\u202e2" in shown
    assert "[link=http://x]word[/link]\\x07 \\ud800" in shown
    assert not any(code in shown for code in ("\x1b[31m", "\x1b[2J", "\x07", "\r"))


def test_a_sentence_is_one_printable_line() -> None:
    assert explain(CheckpointError("a\x1b[31m\nname\u2028b")) == "a\\x1b[31m name b"


def test_lines_are_not_cut_where_there_is_no_terminal() -> None:
    assert wide_console(Console(file=io.StringIO(), width=80)).width == 120
    assert wide_console(Console(file=io.StringIO(), width=200), 160).width == 200
    assert wide_console(Console(file=io.StringIO(), width=50, force_terminal=True)).width == 50


@pytest.mark.parametrize(("terminal", "width"), [(True, 40), (True, 24), (True, 10), (False, 30)])
def test_a_table_loses_nothing_where_the_terminal_is_narrow(terminal: bool, width: int) -> None:
    """At 80 columns the table of a run lost its columns m, r and k, and the last digits of its errors."""
    stream = io.StringIO()
    table = new_table("a run", ("bank", "m", "kept of\nfamily", "RelFrob"))
    add_row(table, ("layer000.up", "16", "59.6%", "0.3081"))
    show_table(Console(file=stream, force_terminal=terminal or None, width=width, color_system=None), table)
    shown = stream.getvalue()
    assert all(text in shown for text in ("layer000.up", " 16 ", "59.6%", "0.3081", "kept of", "family"))
    whole = max(map(len, shown.splitlines()))
    assert whole <= width or whole <= 31 or not terminal  # 31: without frame, one column apart


def test_a_bar_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(3, "fit", "sizes") as bar:
        bar.update()
    assert capsys.readouterr() == ("", "")


def test_the_typed_folder_is_the_one_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`out=2026_11_29` named the folder 20261129, and `out=a #2` the folder `a`."""
    monkeypatch.chdir(tmp_path)
    for name in ("2026_11_29", "a #2", "0123"):
        assert parse_options(PatchOptions, ["run=r", f"out={name}"]).out == name
