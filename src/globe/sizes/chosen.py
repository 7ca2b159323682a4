"""The sizes that `bank.kept` chooses for each shape of bank, searched once per run and kept in `frontier.json`."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from globe.checkpoint import Checkpoint
from globe.config.choices import Centre
from globe.config.console import add_row, new_table, show_table, wide_console
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.files import plain_record, read_as, write_json
from globe.fit.plan import (
    BankSize,
    Outline,
    allowed,
    can_be_wide,
    mean_parameters,
    resolve_sizes,
    target_support,
)
from globe.fit.provenance import bank_options, source_of
from globe.numerics.device import bank_seed
from globe.sizes.budget import Room, candidates, too_small
from globe.sizes.byte_room import ByteRoom
from globe.sizes.byte_room import too_small as bytes_too_small
from globe.sizes.byte_search import search_bytes
from globe.sizes.search import RATIO, Frontier, described, search
from globe.sizes.serving import Serving, costs_of, served, serving_of, unservable
from globe.sizes.sizing import Sizing

_log = logging.getLogger(__name__)
FORMAT_VERSION = 3
Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Searched:
    """A search and what it belongs to."""

    probed: str
    """key of the bank whose experts were fitted"""
    fingerprint: str
    """hash of all that decides the choice"""
    frontier: Frontier


@dataclass(frozen=True, slots=True)
class _File:
    format_version: int
    shapes: dict[str, Searched]
    """by their names, as `7x48x64`"""


def room_of(config: Config, bank: Outline) -> Room:
    """Return what `bank.kept` leaves for adapters, atoms and codes. Raises ConfigError where nothing fits."""
    assert config.bank.kept is not None
    room = Room(*bank.shape, max(0, allowed(config, bank)))
    if not candidates(room, ratio=RATIO, low_rank=False):
        raise too_small(config.bank.kept, room, means=mean_parameters(config, bank))
    if not any(allows(config, m) for m in range(1, bank.n + 1)):
        target_support(config, bank.n)  # raises, with the sentence for a number that no bank can have
    if not candidates(room, ratio=RATIO, low_rank=False, allows=lambda m: allows(config, m)):
        raise ConfigError(
            f"bank.kept={config.bank.kept} leaves no room for the atoms that "
            f"codes.target_support={config.codes.target_support} needs: give a larger share or a smaller support"
        )
    return room


def limits_of(config: Config, checkpoint: Checkpoint, bank: Outline, room: Room) -> Serving | None:
    """Return what `serve` asks for. Raises ConfigError where no sizes in the room keep to it."""
    serving = serving_of(config, checkpoint, bank)
    if serving is not None:
        found = candidates(room, ratio=RATIO, low_rank=False, allows=lambda m: allows(config, m))
        if not served(found, serving, room.p, room.d):
            raise unservable(serving, room.p, room.d)
    return serving


def byte_room_of(config: Config, bank: Outline) -> ByteRoom:
    """Return what `bank.size` leaves for adapters, atoms and codes. Raises ConfigError where nothing fits."""
    assert config.bank.size is not None
    n, p, d = bank.shape
    # a scalar mean is stored in the dtype of the fit
    means = mean_parameters(config, bank) * (32 if config.normalise.centre is Centre.scalar else 16)
    bits = math.floor(config.bank.size * 16 * n * p * d) - means
    room = ByteRoom(
        n, p, d, bits, config.bank.group_A, config.bank.group_B, can_be_wide(config), config.bank.coded
    )
    if room.filled(1, 1.0) is None:
        raise bytes_too_small(config.bank.size, room)
    return room


def allows(config: Config, m: int) -> bool:
    """Return whether `codes.target_support` comes out for m atoms."""
    try:
        target_support(config, m)
    except ConfigError:
        return False
    return True


def choose_sizes(
    config: Config, banks: Sequence[Outline], sizing: Sizing, file: Path
) -> dict[Shape, BankSize]:
    """Choose the sizes of every shape. A search that `file` already holds is not repeated; a new one is added to it.

    Of the banks of a shape the middle one is probed. The table of a new search is printed. Raises
    ConfigError where nothing fits in the budget, CheckpointError when its experts can't be read, FitError when every
    probe breaks.
    """
    by_shape: dict[Shape, list[Outline]] = {}
    for bank in banks:
        by_shape.setdefault(bank.shape, []).append(bank)
    find_room = room_of if config.bank.size is None else byte_room_of
    rooms = {shape: find_room(config, alike[0]) for shape, alike in by_shape.items()}
    if config.bank.m is not None:  # with bank.size: nothing but bits is left to choose
        return {shape: given_bytes(config, alike[0]) for shape, alike in by_shape.items()}
    known, chosen = _read(file), {}
    for shape, alike in by_shape.items():
        probed = alike[len(alike) // 2]
        fingerprint = _fingerprint(config, probed, rooms[shape], sizing)
        searched = known.get(shape)
        if searched is None or searched.fingerprint != fingerprint:
            searched = Searched(probed.key, fingerprint, _search(config, probed, rooms[shape], sizing))
            known[shape] = searched
            _write(file, known)
            if not sizing.quiet:
                print_frontier(searched)
        chosen[shape] = searched.frontier.chosen
        _log.info("%s: %s", _name(shape), searched.frontier.chosen.text)
        for form, cost in costs_of(config, sizing.checkpoint, probed, searched.frontier.chosen).items():
            _log.info("served %s, the experts of a layer take %s of dense", form, cost.text)
    return chosen


def given_bytes(config: Config, bank: Outline) -> BankSize:
    """Return the sizes that are given with the bits that `bank.size` leaves for them."""
    room, sizes = byte_room_of(config, bank), resolve_sizes(config, bank)
    found = room.given(sizes.m, sizes.r)
    if found is None:
        raise ConfigError(
            f"bank.size={config.bank.size} leaves less than a bit for each number of adapters of {sizes.r} columns: "
            "give a larger share, or fewer bank.m or bank.r"
        )
    _log.info("%s: %s", _name(bank.shape), found.text)
    return found


def _search(config: Config, probed: Outline, room: Room | ByteRoom, sizing: Sizing) -> Frontier:
    joined, metric = sizing.read(config, probed)
    experts = joined.experts
    seed = bank_seed(config.seed, f"sizes of {_name(probed.shape)}")
    if isinstance(room, ByteRoom):
        return search_bytes(experts, room, config, metric=metric, seed=seed)
    return search(
        experts,
        room,
        config,
        metric=metric,
        seed=seed,
        allows=lambda m: allows(config, m),
        serving=limits_of(config, sizing.checkpoint, probed, room),
    )


def _fingerprint(config: Config, probed: Outline, room: Room | ByteRoom, sizing: Sizing) -> str:
    source = source_of(config, sizing.checkpoint, probed, sizing.calibration)
    what = [bank_options(config), probed.key, asdict(room), source["sha256"], sizing.device.type]
    what += [source["calibration"]] if "calibration" in source else []
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _name(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _write(file: Path, known: dict[Shape, Searched]) -> None:
    shapes = {_name(shape): searched for shape, searched in known.items()}
    write_json(file, plain_record(_File(FORMAT_VERSION, shapes)))


def _read(file: Path) -> dict[Shape, Searched]:
    """Return what a file holds; nothing, with a warning, if it is damaged or of another version."""
    record = read_as(_File, file)
    if record is None or record.format_version != FORMAT_VERSION:
        return {}
    return {(room.n, room.p, room.d): one for one in record.shapes.values() for room in [one.frontier.room]}


def print_frontier(searched: Searched, console: Console | None = None) -> None:
    """Print the table of a search: what each candidate keeps, and its error after each rung."""
    show_table(wide_console(console), frontier_table(searched))


def frontier_table(searched: Searched) -> Table:
    """Return the table, round by round: dense candidates by m, then low-rank ones by rank; the chosen one is bold."""
    frontier = searched.frontier
    room = frontier.room
    full = room.n * room.p * room.d
    few = frontier.chosen.bits_A is not None
    bits = ("bits of A", "bits of B") if few else ()
    table = new_table(
        f"sizes within {room.limit / full:.1%} of {searched.probed}",
        ("fitted to", "m", "r", "k", *bits, "kept", "error"),
    )
    for one in frontier.rounds:
        for probe in sorted(one.probes, key=lambda probe: (probe.size.atom_rank or 0, probe.size.m)):
            size = probe.size
            cells = (
                described(one, room),
                str(size.m),
                str(size.r),
                "-" if size.atom_rank is None else str(size.atom_rank),
                *((f"{size.bits_A:.2f}", str(size.bits_B)) if few else ()),
                f"{room.parameters(size) / full:.2%}",
                "broke" if probe.relfrob is None else f"{probe.relfrob:.4f}",
            )
            last = one is frontier.rounds[-1]
            add_row(table, cells, "bold" if last and size == frontier.chosen else None)
    return table
