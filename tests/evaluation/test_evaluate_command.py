"""`python -m globe.evaluate`: its options, its sentences, its file and its table."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from evaluation_support import TEXT, write_tokenizer

import globe.evaluate as command
from globe.config.command_line import parse_options
from globe.config.commands import start
from globe.evaluate import EvaluateOptions
from globe.evaluation import measure
from globe.patch import parse, patch

SMALL = ("window=16", "stride=8", "batch=4", "max_tokens=150")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["globe.evaluate", *arguments])
    try:
        start(command.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def load(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.fixture(scope="module")
def lossless(lossless_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lossless-patched")
    for form in ("dense", "globe"):
        patch(parse([f"run={lossless_run}", f"out={folder / form}", f"format={form}"]))
    return {"run": lossless_run, "dense": folder / "dense", "globe": folder / "globe"}


@pytest.mark.parametrize("form", ["run", "dense", "globe"])
def test_a_lossless_artefact_changes_nothing(
    form: str,
    lossless: dict[str, Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without `against`: what the model was made from is on record."""
    assert run_command(monkeypatch, f"model={lossless[form]}", f"text={text_file}", *SMALL) == 0
    record = load(lossless[form] / "evaluation.json")
    before, after = record["perplexity_original"], record["perplexity"]
    assert after["nll"] == pytest.approx(before["nll"], rel=1e-6)
    assert record["rise"]["ratio"] == pytest.approx(1, rel=1e-6)
    assert 0 <= record["divergence"]["kl"] < 1e-9
    assert record["divergence"]["top1_agreement"] == 1.0
    assert [one["layer"] for one in record["activation_errors"]] == [0, 1]
    assert all(one["experts"] < 1e-5 and one["block"] < 1e-5 for one in record["activation_errors"])
    assert len(record["spot_checks"]) == 8
    for check in record["spot_checks"]:
        assert check["relfrob"] < 1e-6
        assert check["alignment_left"] == pytest.approx(1, abs=1e-6)
        assert check["effective_rank"][0] == check["effective_rank"][1]
    assert record["parity_holds"] is True
    assert record["settings"]["counted_tokens"] == 149
    assert "written to" in capsys.readouterr().out


def test_what_is_lost_is_seen(
    lossy_run: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "figures" / "lossy.json"
    arguments = (f"model={lossy_run}", f"text={text_file}", f"out={out}", *SMALL)
    assert run_command(monkeypatch, *arguments) == 0
    record = load(out)
    assert record["divergence"]["kl"] > 0.01
    assert 0 < record["divergence"]["kl_interval"][0] < record["divergence"]["kl"]
    assert record["divergence"]["top1_agreement"] < 1
    assert record["rise"]["perplexity"] == pytest.approx(
        record["perplexity"]["perplexity"] - record["perplexity_original"]["perplexity"]
    )
    families = record["sizes"]["family_parameters"]
    assert families["ratio"] == families["after"] / families["before"]
    assert record["sizes"]["places"] == [[0, "up"], [1, "gate"]]
    shown = capsys.readouterr()
    for text in (
        "perplexity per token",
        "KL(original || model)",
        "routed experts",
        "parity",
        "parameters of the model",
    ):
        assert text in shown.out
    assert f"{record['perplexity']['perplexity']:.4g}" in shown.out
    assert not shown.err
    first = record
    assert run_command(monkeypatch, *arguments) == 0
    again = load(out)
    assert again.pop("seconds") > 0
    first.pop("seconds")
    assert again == first  # but for the time it took
    assert [path.name for path in out.parent.iterdir()] == ["lossy.json"]


def test_a_model_alone_has_no_before(
    checkpoint_of: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "alone.json"
    assert (
        run_command(monkeypatch, f"model={checkpoint_of()}", f"text={text_file}", f"out={out}", *SMALL) == 0
    )
    record = load(out)
    absent = ("original", "perplexity_original", "rise", "divergence", "parity")
    assert all(record[name] is None for name in absent)
    assert record["activation_errors"] == record["spot_checks"] == []
    assert record["perplexity"]["perplexity"] > 1
    assert "KL" not in capsys.readouterr().out


def test_models_of_different_build_are_compared_by_what_they_say(
    checkpoint_of: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "two.json"
    arguments = (
        f"model={checkpoint_of()}",
        f"against={checkpoint_of('olmoe')}",
        f"text={text_file}",
        f"out={out}",
    )
    assert run_command(monkeypatch, *arguments, *SMALL) == 0
    record = load(out)
    assert record["divergence"]["kl"] > 0.01
    assert record["activation_errors"] == record["spot_checks"] == []


def test_the_embedded_model_and_text_need_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "model=embedded", "max_tokens=400") == 0
    shown = capsys.readouterr().out
    assert "embedded on embedded (399 tokens)" in shown
    assert "give out=FILE" in shown
    assert not list(tmp_path.iterdir())


def test_a_broken_parity_is_said_aloud(
    lossy_run: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure, "tolerance", lambda dtype: 1e-12)
    out = tmp_path / "x.json"
    assert run_command(monkeypatch, f"model={lossy_run}", f"text={text_file}", f"out={out}", *SMALL) == 0
    assert load(out)["parity_holds"] is False
    assert "more than float32 explains" in capsys.readouterr().err


def test_tasks_run_on_both_models(
    lossy_run: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[Any] = []

    def tasks(model: Any, tokenizer: Any, names: list[str], **options: Any) -> dict[str, dict[str, float]]:
        seen.append((model, options))
        return {names[0]: {"acc,none": len(seen) / 10, "acc_stderr,none": 0.01}}

    monkeypatch.setattr(measure, "run_tasks", tasks)
    monkeypatch.setattr(measure, "check_tasks", lambda names, include_path: None)
    out = tmp_path / "x.json"
    arguments = (f"model={lossy_run}", f"text={text_file}", f"out={out}", "tasks=[letters]", "limit=4")
    assert run_command(monkeypatch, *arguments, *SMALL) == 0
    assert len(seen) == 2
    assert seen[0][0] is not seen[1][0]
    assert seen[0][1] == {"include_path": None, "limit": 4, "batch": 4, "seed": 0}
    record = load(out)
    assert record["tasks"]["letters"]["acc,none"] == 0.1
    assert record["tasks_original"]["letters"]["acc,none"] == 0.2
    (line,) = (one for one in capsys.readouterr().out.splitlines() if "letters" in one)
    assert "-0.1000" in line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "model is missing: give model="),
        (("model=MODEL", "colour=red"), "colour is not an option: give one of model, sweep, against"),
        (("model=MODEL", "dense"), "'dense' is not understood"),
        (("model=nowhere",), "model='nowhere' is neither a folder here nor a hub id"),
        (("model=EMPTY",), "has no config.json"),
        (("model=MODEL", "against=nowhere"), "against='nowhere' is neither"),
        (("model=MODEL", "against=COMPACT"), "is a compact checkpoint: give the original"),
        (("model=MODEL", "text=nowhere.txt"), "text='nowhere.txt' can't be read"),
        (("model=MODEL", "max_tokens=9"), "the text has 9 tokens, fewer than window=256"),
        (("model=MODEL", "window=16", "stride=17"), "stride=17 is not possible"),
        (("model=MODEL", "window=40", "stride=20"), "window=40 is more than the 32 positions"),
        (("model=MODEL", "batch=0"), "batch=0 is not possible: give an integer of at least 1"),
        (("model=MODEL", "batch=many"), "batch is not possible: give an integer"),
        (("model=MODEL", "dtype=int4"), "dtype is not possible: give one of auto, float32"),
        (("model=MODEL", "device=tpu"), "device is not possible: give one of auto, cpu"),
        (("model=MODEL", "tokenizer=EMPTY"), "has no tokenizer: give the folder of one"),
        (("model=MODEL", "tokenizer=DAMAGED"), "can't be loaded"),
        (("model=MODEL", "against=SWAPPED", "window=16", "stride=8"), "different vocabularies"),
        (("model=SMALLER", "window=16", "stride=8"), "the tokenizer gives token"),
        (
            ("model=SMALLER", "against=MODEL", "window=16", "stride=8"),
            "vocabulary of 200 and the original one of 257",
        ),
        (("model=COMPACT", "S_cache=-2", "window=16", "stride=8"), "S_cache=-2 is not possible"),
        (("model=RUN", "against=OLMOE"), "give the checkpoint it was learned from as against"),
        (("model=NOBANKS",), "holds no finished bank"),
        (("model=ORPHAN",), "can't be opened here: give its folder as against"),
        (("model=MODEL", "tasks=[arc_easy]"), "pip install 'globe-moe[eval]'"),
        (("model=MODEL", "include_path=tasks"), "give tasks=[...] as well"),
        (("model=MODEL", "sweep=RUN"), "model and sweep are both given"),
        (("sweep=EMPTY",), "holds no run with banks"),
        (("sweep=RUN", "out=x.json"), "out is not possible with sweep"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_1(
    arguments: tuple[str, ...],
    sentence: str,
    checkpoint_of: Callable[..., Path],
    lossless: dict[str, Path],
    lossy_run: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = {"MODEL": checkpoint_of(), "COMPACT": lossless["globe"], "RUN": lossy_run}
    folders |= {name: tmp_path / name for name in ("EMPTY", "DAMAGED", "SWAPPED", "NOBANKS", "ORPHAN")}
    folders["EMPTY"].mkdir()
    (folders["NOBANKS"] / "banks").mkdir(parents=True)
    used = " ".join(arguments)
    if "DAMAGED" in used:
        folders["DAMAGED"].mkdir()
        (folders["DAMAGED"] / "tokenizer.json").write_text("{}")
    if "SWAPPED" in used:
        shutil.copytree(checkpoint_of(), folders["SWAPPED"])
        write_tokenizer(folders["SWAPPED"], swapped=True)
    if "SMALLER" in used:
        folders["SMALLER"] = checkpoint_of(vocab_size=200)
    if "OLMOE" in used:
        folders["OLMOE"] = checkpoint_of("olmoe")
    if "ORPHAN" in used:
        shutil.copytree(lossless["dense"], folders["ORPHAN"], ignore=shutil.ignore_patterns("eval*"))
        record = folders["ORPHAN"] / "globe_patch.json"
        record.write_text(record.read_text().replace(str(checkpoint_of()), "/gone/away"))
    filled = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        filled.append(f"{key}={folders[value]}" if value in folders else argument)
    if "text=" not in used and arguments:
        filled.append(f"text={text_file}")
    assert run_command(monkeypatch, *filled) == 1
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out
    assert not list(tmp_path.rglob("evaluation.json"))


def test_help_names_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n{one.name}=" in text for one in fields(EvaluateOptions))


def test_options_are_read_into_their_types() -> None:
    options = parse_options(
        EvaluateOptions, ["model=a", "S_cache=4", "tasks=[x,y]", "dtype=bfloat16", "limit=7"]
    )
    assert (options.model, options.against, options.text, options.S_cache) == ("a", "auto", "embedded", 4)
    assert options.tasks == ["x", "y"]
    assert (options.dtype, options.limit, options.max_tokens) == ("bfloat16", 7, None)


def test_the_text_is_long_enough_for_intervals() -> None:
    assert len(TEXT.encode()) > 150 + 16
