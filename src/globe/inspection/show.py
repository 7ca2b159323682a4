"""The tables of `python -m globe.inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from globe.config.console import add_row, new_table, say, show_table, wide_console
from globe.config.layers import ranges

_WIDTH = 160
_FIGURES = (
    "relfrob",
    "relfrob_start",
    "explained_variance",
    "effective_rank_mean",
    "support_median",
    "zero_share",
    "coherence_max",
    "steps",
    "stop",
)


def show_model(found: dict[str, Any], console: Console | None = None) -> None:
    """Print what `inspect_model` found."""
    console = wide_console(console, _WIDTH)
    source = found["source"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    say(console, f"{source['id']}{revision}: {found['model_type']}")
    dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in found["dtypes"].items())
    files = f"{found['files']} file{'s' * (found['files'] != 1)}"
    say(
        console,
        f"{found['parameters']:,} parameters, {size(found['bytes'])} of tensors in {files} ({dtypes})",
    )
    if method := found.get("quantisation"):
        say(
            console,
            f"quantised with {method}: what follows is said of the dequantised model that GloBE reads from it",
        )
    if found["kind"] == "checkpoint":
        _experts(console, found)
        _predictions(console, found)
    if found["patched"] is not None:
        _patched(console, found["patched"])


def _experts(console: Console, found: dict[str, Any]) -> None:
    layers, routed = found["moe_layers"], found["routed_parameters"]
    active = f", {found['experts_per_token']} experts a token" if found["experts_per_token"] else ""
    say(
        console,
        f"{len(layers)} of {found['layers']} layers have routed experts ({ranges(layers)}){active}; "
        f"{routed:,} parameters in them, {routed / found['parameters']:.1%} of the model",
    )
    headings = ("family", "layers", "n x p x d", "dtype", "parameters", "bytes", "of model", "first tensor")
    table = new_table("routed experts", headings, left=("layers", "first tensor"), wrap=headings)
    for group in found["experts"]:
        cells = (
            group["family"],
            ranges(group["layers"]),
            f"{group['n']} x {group['p']} x {group['d']}",
            group["dtype"],
            f"{group['parameters']:,}",
            size(group["bytes"]),
            f"{group['share']:.1%}",
            group["tensor"],
        )
        add_row(table, cells)
    show_table(console, table)
    if (shared := found["shared"]) is not None:
        what = f"{shared['p']} x {shared['d']} in {ranges(shared['layers'])}"
        say(console, f"besides, a shared expert that every token uses, gate and up {what}")


def _predictions(console: Console, found: dict[str, Any]) -> None:
    title = "kept, if up and gate of all these layers get banks of their own"
    table = new_table(title, ("bank.m", "bank.r", "m x r", "kept of families", "kept of model", "parameters"))
    for row in found["predictions"]:
        sizes = dict.fromkeys(
            f"{one['m']} x {one['r']}{'~' if one['rounded'] else ''}" for one in row["sizes"]
        )
        cells = (
            row["m"],
            row["r"],
            ", ".join(sizes),
            f"{row['kept']:.1%}",
            f"{row['kept_model']:.1%}",
            f"{row['parameters']:,}",
        )
        add_row(table, cells)
    show_table(console, table)
    if any(one["rounded"] for row in found["predictions"] for one in row["sizes"]):
        say(console, "~ is rounded: globe.train takes whole numbers only")


def _patched(console: Console, record: dict[str, Any]) -> None:
    try:
        numbers = record["parameters"]
        line = (
            f"written by globe.patch ({record['format']}) from {record['source']['id']}: {len(record['banks'])} banks, "
            f"{numbers['kept_of_families']:.1%} of their families and {numbers['kept_of_model']:.1%} of the model kept "
            "when counted as factors"
        )
    except (LookupError, TypeError, ValueError):
        line = "globe_patch.json is not what globe.patch writes: how this was made is not known"
    say(console, line)


def show_banks(found: dict[str, Any], console: Console | None = None) -> None:
    """Print what `inspect_banks` found."""
    console = wide_console(console, _WIDTH)
    banks = found["banks"]
    if found["kind"] == "run":
        _run(console, found)
    low_rank = any(bank.get("atom_rank") is not None for bank in banks)
    sizes = ("n x p x d", "m", "r", *(["k"] if low_rank else []))
    figures = ("RelFrob", "median support", "files")
    table = new_table("banks", ("bank", *sizes, "kept", "dtype", "bytes", *figures), wrap=figures)
    for bank in banks:
        add_row(table, _bank_row(bank, low_rank=low_rank), None if bank["intact"] else "red")
    if banks:
        show_table(console, table)
    if low_rank:
        say(console, "k is the rank of atoms that are stored as products of two factors, - is none")
    if len(banks) == 1 and banks[0]["intact"]:
        _details(console, banks[0])
    _provenance(console, [bank for bank in banks if bank["intact"]])


def _run(console: Console, found: dict[str, Any]) -> None:
    times = " to ".join(time for time in (found["started"], found["ended"]) if time)
    say(console, f"{found['name']}: {found['state'] or 'of unknown state'}{f' ({times})' if times else ''}")
    if found["error"]:
        say(console, found["error"])
    if found["unfinished"]:
        say(
            console, f"unfinished fits, which the same command goes on with: {', '.join(found['unfinished'])}"
        )
    summary = found["summary"]
    if summary is not None and summary["relfrob"] is not None:
        say(
            console,
            f"RelFrob {summary['relfrob']:.4f}, {summary['kept']:.1%} of the families and "
            f"{summary['kept_model']:.1%} of the model's {summary['parameters']:,} parameters kept; "
            f"{summary['seconds']:.1f} s on {summary['device']}",
        )


def _bank_row(bank: dict[str, Any], *, low_rank: bool) -> list[str]:
    if not bank["intact"]:
        return [bank["key"], *["-"] * (8 + low_rank), "damaged"]
    figures = bank["figures"]
    return [
        bank["key"],
        f"{bank['n']} x {bank['p']} x {bank['d']}",
        str(bank["m"]),
        str(bank["r"]),
        *(["-" if bank["atom_rank"] is None else str(bank["atom_rank"])] if low_rank else []),
        f"{bank['kept']:.1%}",
        bank["dtype"],
        size(bank["bytes"]),
        _figure(figures.get("relfrob"), ".4f"),
        _figure(figures.get("support_median"), "g"),
        "whole",
    ]


def _figure(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _details(console: Console, bank: dict[str, Any]) -> None:
    figures = bank["figures"]
    known = [(name, figures[name]) for name in _FIGURES if figures.get(name) is not None]
    listed = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in known
    )
    members = ", ".join(
        f"layer {one['layer']} {one['family']} ({one['experts']} experts)" for one in bank["members"]
    )
    say(console, f"{members}; phi: {bank['activation']}, lam {bank['lam']:g}; seed {bank['seed']}")
    if listed:
        say(console, listed)


def _provenance(console: Console, banks: Sequence[dict[str, Any]]) -> None:
    """Say where the weights came from, in one line per source."""
    sources = [bank["source"] for bank in banks]
    named = dict.fromkeys((str(one.get("id")), str(one.get("revision") or "")) for one in sources)
    for source, revision in named:
        at = f" at {revision}" if revision else ""
        hashes = [str(one.get("sha256"))[:12] for one in sources if str(one.get("id")) == source]
        which = f"tensors {hashes[0]}..." if len(hashes) == 1 else f"{len(hashes)} hashes of tensors"
        say(console, f"learned from {source}{at}, {which}")


def size(count: int) -> str:
    """Return bytes in a unit that fits, by powers of 1000: 692.1 MB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
