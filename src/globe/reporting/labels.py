"""What tells the runs of a sweep apart: the options that differ, a short label of each run, and what compares."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from globe.errors import printable
from globe.reporting.runs import ReportRun

SUPPORT, SEED = "codes.target_support", "seed"
_SHORT = {SUPPORT: "support", "bank.atom_rank": "k"}
_LONGEST = 44


def varied_options(runs: Sequence[ReportRun]) -> tuple[str, ...]:
    """Return the options that are not alike in all runs that have them, in the order of the configuration."""
    known = [run.options for run in runs if run.options]
    names = list(dict.fromkeys(name for options in known for name in options))
    values = {name: {_text(options[name]) for options in known if name in options} for name in names}
    return tuple(name for name in names if len(values[name]) > 1)


def common_options(runs: Sequence[ReportRun]) -> dict[str, Any]:
    """Return the options that are alike in all runs."""
    known = [run.options for run in runs if run.options]
    varied = set(varied_options(runs))
    return {name: value for name, value in known[0].items() if name not in varied} if known else {}


def short_names(varied: Sequence[str]) -> dict[str, str]:
    """Return what options are called in legends: the shortest end of a name that no other has."""
    return {name: _SHORT.get(name) or _unique_end(name, varied) for name in varied}


def _unique_end(name: str, names: Sequence[str]) -> str:
    parts = name.split(".")
    ends = (".".join(parts[at:]) for at in range(len(parts) - 1, 0, -1))
    return next((end for end in ends if sum(f".{one}".endswith(f".{end}") for one in names) == 1), name)


def option_text(name: str, value: Any) -> str:
    """Return the value of an option as a table shows it."""
    if value is None:
        return "dense" if name in _SHORT else "-"
    return str(value) if isinstance(value, str | int | float) else _text(value)


def settings(run: ReportRun, names: Iterable[str], short: dict[str, str]) -> list[str]:
    """Return `m=n/4` for each of the options."""
    return [f"{short[name]}={option_text(name, run.options.get(name))}" for name in names]


def labels(runs: Sequence[ReportRun]) -> dict[int, str]:
    """Return `#3 m=n/4 r=p/2` by a run's number: the number in the table, and what tells the run from the others.

    Where that would be too long, it says only what most runs have otherwise, as many whole settings as there is room
    for; `base` is a run that is like most in all.
    """
    varied = varied_options(runs)
    short = short_names(varied)
    common = {name: _most_common(runs, name) for name in varied}
    found = {}
    for run in runs:
        if varied and run.options:
            text = " ".join(settings(run, varied, short))
            if len(text) > _LONGEST:
                own = [name for name in varied if _text(run.options.get(name)) != common[name]]
                text = _as_fits(settings(run, own, short)) or "base"
        else:
            text = run.name
        found[run.number] = f"#{run.number} {text}"
    return found


def _as_fits(words: list[str]) -> str:
    text = ""
    for at, word in enumerate(words):
        longer = f"{text} {word}".lstrip()
        if len(longer) > _LONGEST and text:
            return f"{text} and {len(words) - at} more"
        text = longer
    return text


def _most_common(runs: Sequence[ReportRun], name: str) -> str:
    values = Counter(_text(run.options.get(name)) for run in runs if run.options)
    return values.most_common(1)[0][0]


def alike_but(runs: Sequence[ReportRun], *names: str) -> list[list[ReportRun]]:
    """Return the measured runs in groups that differ in nothing but these options, in the order of the runs."""
    groups: dict[str, list[ReportRun]] = {}
    for run in runs:
        if run.measured:
            rest = {key: value for key, value in run.options.items() if key not in names}
            groups.setdefault(f"{group_of(run)} {_text(rest)}", []).append(run)
    return list(groups.values())


def group_of(run: ReportRun) -> str:
    """Return whose experts a run compresses: only runs alike in this compare by their errors."""
    assert run.summary is not None
    banks = run.summary.banks
    what = banks[0].key if len(banks) == 1 else f"{len(banks)} banks, {banks[0].key} to {banks[-1].key}"
    return printable(f"{run.summary.source.get('id')} {what}")


def methods_of(run: ReportRun) -> str:
    """Return the methods of a run's banks."""
    assert run.summary is not None
    return "+".join(dict.fromkeys(bank.method for bank in run.summary.banks))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
