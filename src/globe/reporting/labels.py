"""What tells the runs of a sweep apart: the options that differ, a short label of each run, and what compares."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from globe.reporting.runs import ReportRun

_SHORT = {"codes.target_support": "support", "bank.atom_rank": "k"}
_LONGEST = 44


def varied_options(runs: Sequence[ReportRun]) -> tuple[str, ...]:
    """The options that are not alike in all runs that have them, in the order of the configuration."""
    known = [run.options for run in runs if run.options]
    names = list(dict.fromkeys(name for options in known for name in options))
    values = {name: {_text(options[name]) for options in known if name in options} for name in names}
    return tuple(name for name in names if len(values[name]) > 1)


def common_options(runs: Sequence[ReportRun]) -> dict[str, Any]:
    """The options that are alike in all runs."""
    known = [run.options for run in runs if run.options]
    varied = set(varied_options(runs))
    return {name: value for name, value in known[0].items() if name not in varied} if known else {}


def short_names(varied: Sequence[str]) -> dict[str, str]:
    """How an option is called in legends: the shortest end of its name that no other has."""
    return {name: _SHORT.get(name) or _unique_end(name, varied) for name in varied}


def _unique_end(name: str, names: Sequence[str]) -> str:
    parts = name.split(".")
    ends = (".".join(parts[at:]) for at in range(len(parts) - 1, 0, -1))
    return next((end for end in ends if sum(f".{one}".endswith(f".{end}") for one in names) == 1), name)


def option_text(name: str, value: Any) -> str:
    if value is None:
        return "dense" if name in ("codes.target_support", "bank.atom_rank") else "-"
    return str(value) if isinstance(value, str | int | float) else _text(value)


def labels(runs: Sequence[ReportRun]) -> dict[int, str]:
    """`#3 m=n/4 r=p/2` by a run's number: the number in the table, and what tells the run from the others.

    Where that would be too long, only what most runs have otherwise; `base` is a run that is like most in all.
    """
    varied = varied_options(runs)
    short = short_names(varied)
    common = {name: _most_common(runs, name) for name in varied}

    def settings(run: ReportRun, chosen: Sequence[str]) -> str:
        return " ".join(f"{short[name]}={option_text(name, run.options.get(name))}" for name in chosen)

    found = {}
    for run in runs:
        text = settings(run, varied) if varied and run.options else run.name
        if len(text) > _LONGEST and varied and run.options:
            own = [name for name in varied if _text(run.options.get(name)) != common[name]]
            text = settings(run, own) or "base"
        text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
        found[run.number] = f"#{run.number} {text}"
    return found


def _most_common(runs: Sequence[ReportRun], name: str) -> str:
    values = Counter(_text(run.options.get(name)) for run in runs if run.options)
    return values.most_common(1)[0][0]


def group_of(run: ReportRun) -> str:
    """Whose experts a run compresses, and by which method: only runs alike in the first compare by their errors."""
    assert run.summary is not None
    banks = run.summary.banks
    what = banks[0].key if len(banks) == 1 else f"{len(banks)} banks, {banks[0].key} to {banks[-1].key}"
    return f"{run.summary.source.get('id')} {what}"


def methods_of(run: ReportRun) -> str:
    assert run.summary is not None
    return "+".join(dict.fromkeys(bank.method for bank in run.summary.banks))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
