"""Every run of a sweep, measured on one text beside one original: what was measured before is not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from globe.config.commands import explain
from globe.config.console import add_row, new_table
from globe.errors import ConfigError
from globe.evaluation.ground import Ground
from globe.evaluation.measure import measure
from globe.evaluation.options import EvaluateOptions
from globe.evaluation.report import plain
from globe.evaluation.subject import Subject, open_subject
from globe.evaluation.tasks import check_tasks
from globe.files import read_record, write_json
from globe.runs.comparison import short_names

EVALUATION_FILE = "evaluation.json"
_OF_NO_FIGURE = ("model", "sweep", "out")
"""Settings that change no figure of a model."""


@dataclass(slots=True)
class SweepResult:
    """What came of the runs; their folders are relative to that of the sweep."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """evaluation.json of each run that has been measured, now or before"""
    twins: dict[str, str] = field(default_factory=dict)
    """runs with the same banks as another (`S_cache` is no part of a fit), and that other"""
    failed: dict[str, str] = field(default_factory=dict)
    """runs that could not be measured, with the sentence"""
    measured: int = 0
    """runs that were measured now"""


def evaluate_sweep(options: EvaluateOptions, say: Callable[[str], None]) -> SweepResult:
    """Measure every run below `options.sweep` that has banks, and write evaluation.json into its folder.

    The original is loaded once, and its logits are computed once as far as they can be kept. A run whose file says
    that these very banks were measured with these settings is left as it is, so a sweep goes on where it was stopped.
    `say` gets a line for each run.

    Raises
    ------
    ConfigError if the folder holds no run with banks.
    """
    check_tasks(options.tasks, options.include_path)
    assert options.sweep is not None
    root = Path(options.sweep)
    folders = list(_runs(root))
    if not folders:
        raise ConfigError(
            f"sweep={str(root)!r} holds no run with banks (banks/*/globe.json): give the folder of a sweep"
        )
    result, ground = SweepResult(), None
    seen: dict[str, str] = {}
    for number, folder in enumerate(folders, start=1):
        name = folder.relative_to(root).as_posix()
        place = f"{number} of {len(folders)}"
        try:
            own = replace(options, model=str(folder), sweep=None)
            subject, original = open_subject(str(folder), options.against)
            ground = _ground(ground, own, subject, original)
            banks = json.dumps(subject.bank_hashes, sort_keys=True)
            if (twin := seen.setdefault(banks, name)) != name:
                result.twins[name] = twin
                say(f"{place}: {name} has the banks of {twin}")
                continue
            record = _measured_before(folder, ground, subject)
            if record is None:
                record = measure(subject, ground, place).to_dict()
                write_json(folder / EVALUATION_FILE, record)
                result.measured += 1
                say(f"{place}: {name}: {figures(record)}")
            else:
                say(f"{place}: {name}: {figures(record)} (measured before)")
            result.records[name] = record
        except Exception as error:
            sentence = explain(error)
            if sentence is None:  # a defect of ours
                raise
            result.failed[name] = sentence
            say(f"{place}: {name}: {sentence}")
    return result


def _runs(root: Path) -> Iterator[Path]:
    """Yield the folders below `root` that hold banks, in the order of their names."""
    if (root / "banks").is_dir():
        yield root
    for folder in sorted(one.parent for one in root.glob("**/banks") if one.is_dir()):
        hidden = any(part.startswith(".") for part in folder.relative_to(root).parts)
        if folder != root and not hidden and any((folder / "banks").glob("*/globe.json")):
            yield folder


def _ground(
    before: Ground | None, options: EvaluateOptions, subject: Subject, original: Subject | None
) -> Ground:
    """Return the ground of the run before if its original is the same, or else a new one."""
    if before is not None and _folder(before.original) == _folder(original):
        return before
    return Ground(options, subject, original)


def _folder(original: Subject | None) -> Path | None:
    return None if original is None else original.folder


def _measured_before(folder: Path, ground: Ground, subject: Subject) -> dict[str, Any] | None:
    """Return what is on record of these banks with these settings; None if there is no such record."""
    record = read_record(folder / EVALUATION_FILE)
    settings = None if record is None else record.get("settings")
    if record is None or not isinstance(settings, dict):
        return None
    wanted = plain(ground.settings(subject))
    same = all(settings.get(name) == value for name, value in wanted.items() if name not in _OF_NO_FIGURE)
    return record if same and figures(record) else None


def figures(record: dict[str, Any]) -> str:
    """Return the figures of an evaluation in a line; an empty one if the record is none."""
    try:
        text = f"perplexity {record['perplexity']['perplexity']:.4f}"
        if record["rise"] is not None:
            text += f" ({100 * (record['rise']['ratio'] - 1):+.2f} %)"
        return text if record["divergence"] is None else f"{text}, KL {record['divergence']['kl']:.4g}"
    except (LookupError, TypeError, ValueError):
        return ""


def shared_with_calibration(record: dict[str, Any]) -> float:
    """Return the share of the text that stands in the calibration text of the model as well."""
    return record["settings"].get("calibration_overlap") or 0.0


def sweep_table(result: SweepResult) -> Table:
    """Return one row per run that has figures, the smallest files first; the least perplexity is bold.

    Bits a weight of the compressed families are shown where factors are rounded to fewer bits than bfloat16 has.
    """
    rows = sorted(result.records.items(), key=lambda one: (one[1]["sizes"]["model_bytes"]["after"], one[0]))
    rounded = any(_bits(record) < 15 * (_share(record, "family_parameters") or 1) for _, record in rows)
    few = ["bits a\nweight"] if rounded else []
    sizes = ["kept of\nfamily", *few, "bytes in\nfiles", "of the\noriginal"]
    figures = ["perplexity", "rise", "KL\n(nats)", "same\nnext token"]
    table = new_table("all runs, smallest first", ["run", *sizes, *figures], wrap=("run",))
    best = min((record["perplexity"]["perplexity"] for _, record in rows), default=None)
    short = short_names([name for name, _ in rows])
    for name, record in rows:
        own, far, rise = record["perplexity"]["perplexity"], record["divergence"], record["rise"]
        cells = (
            short[name],
            _percent(_share(record, "family_parameters")),
            *([f"{_bits(record):.2f}"] if rounded else []),
            f"{record['sizes']['model_bytes']['after']:,}",
            _percent(_share(record, "model_bytes"), 2),
            f"{own:.4f}",
            "-" if rise is None else f"{100 * (rise['ratio'] - 1):+.2f} %",
            "-" if far is None else f"{far['kl']:.4g}",
            "-" if far is None else _percent(far["top1_agreement"]),
        )
        add_row(table, cells, "bold" if own == best else None)
    return table


def _share(record: dict[str, Any], size: str) -> float | None:
    change = record["sizes"][size]
    return None if change is None else change.get("ratio")


def _bits(record: dict[str, Any]) -> float:
    """Return the bits that files hold for each number of the compressed families."""
    sizes = record["sizes"]
    return 8 * sizes["family_bytes"]["after"] / sizes["family_parameters"]["before"]


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"
