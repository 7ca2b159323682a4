"""GloBE against every baseline at the same kept parameters, error by time: `make bench-fit`.

    python experiments/bench/fit.py                                   # globe-ref, layers 0-3, up and gate; hours
    python experiments/bench/fit.py --layers 1 --families up --times 10 30 60 120
    python experiments/bench/fit.py CHECKPOINT --layers 12 --m 4 --r 22 --times 1 3 10

Every method gets its own fit of the longest time, on one thread, counted in CPU seconds, so that other work on the
machine falls on nobody; SLBF, whose cosine ends with its time, gets one for each time. The budget is that of a bank of
m dense atoms with r rows. GloBE runs at that (m, r) and in the free form with as many low-rank atoms as experts. Closed
forms have one error. `rises` counts accepted steps after which the objective was higher (all schedules stand still).

Finished fits are kept in --json and not repeated, so the hours can be split; --tables prints what is known and fits
nothing. Each fit is preceded by a product of fixed size, whose rate is kept with it: equal rates, equal machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.records import Sizes, StepRecord
from globe.baselines import Limits, run_baseline
from globe.baselines.adam import load_optimiser
from globe.baselines.budget import resolve_sizes as baseline_sizes
from globe.checkpoint import open_checkpoint
from globe.config.choices import ADAM_METHODS, Activation, Method
from globe.config.schema import Config, CurveConfig
from globe.errors import GlobeError
from globe.fit.normalise import normalise
from globe.fit.options import fit_options

_DEFAULT = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "globe-ref"
_CLOSED = (Method.svd, Method.shared_basis, Method.mean_svd)
_OURS = ("globe linear", "globe silu", "globe tanh", "globe tanh, low-rank")
_THEIRS = (
    "mobe silu",
    "mobe tanh",
    "mobe_corrected silu",
    "mobe_corrected tanh",
    "slbf silu",
    "slbf tanh",
)


_KINDS = {
    "MoBE": tuple(name for name in _THEIRS if name.startswith("mobe")),
    "SLBF": tuple(name for name in _THEIRS if name.startswith("slbf")),
    "GloBE, dense": tuple(name for name in _OURS if "low-rank" not in name),
    "GloBE, low-rank": tuple(name for name in _OURS if "low-rank" in name),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", nargs="?", help="folder or hub id; left out, globe-ref beside the project"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--families", nargs="+", default=["up", "gate"], choices=("up", "gate"))
    parser.add_argument("--m", type=int, default=15)
    parser.add_argument("--r", type=int, default=88)
    parser.add_argument("--times", type=float, nargs="+", default=[10.0, 30.0, 60.0, 120.0, 600.0])
    parser.add_argument("--methods", nargs="+", default=[*_OURS, *_THEIRS], choices=(*_OURS, *_THEIRS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file of finished fits, read and extended")
    parser.add_argument("--tables", action="store_true", help="print what --json knows, fit nothing")
    return parser.parse_args()


def sizes_for(name: str, X: Tensor, options: argparse.Namespace) -> Sizes:
    """(m, r) as given, or m = n low-rank atoms with the same r within the same budget, as SLBF has them."""
    n, p, d = X.shape
    sizes = Sizes(n, p, d, options.m, options.r)
    if "low-rank" not in name:
        return sizes
    own = baseline_sizes("slbf", n=n, p=p, d=d, budget=sizes.parameters, r=options.r)
    return Sizes(n, p, d, own.m, own.r, atom_rank=own.atom_rank)


def fit_ours(name: str, X: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    config = Config()
    config.train.steps, config.train.patience, config.train.time_limit = 1_000_000, 0, max(options.times)
    linear = "linear" in name
    config.bank.activation = Activation.tanh if "tanh" in name else Activation.silu
    config.schedule.lam = CurveConfig(start=float(not linear), end=float(not linear))
    sizes = sizes_for(name, X, options)
    kept = sizes.kept
    if sizes.atom_rank is not None:
        # k x k numbers of an atom are gauge, an identity in the tightest form: counted as for SLBF
        kept -= sizes.m * sizes.atom_rank**2 / X.numel()
    records: list[StepRecord] = []
    fit_bank(
        X,
        sizes,
        fit_options(config),
        generator=torch.Generator().manual_seed(options.seed),
        on_step=records.append,
        clock=time.process_time,
    )
    return {
        "kept": kept,
        "sizes": f"m={sizes.m} r={sizes.r}" + (f" k={sizes.atom_rank}" if sizes.atom_rank else ""),
        "history": [(record.seconds, record.relfrob) for record in records],
        "rises": sum(b.objective > a.objective for a, b in pairwise(records)),
        "regularised": records[-1].regularised_solves,
    }


def fit_theirs(
    name: str, X: Tensor, std: float, seconds: float, options: argparse.Namespace
) -> dict[str, Any]:
    method, activation = name.split()
    own: dict[str, Any] = {"budget": Sizes(*X.shape, options.m, options.r).parameters, "r": options.r}
    n, p, d = X.shape
    if method != "slbf":
        own["m"] = options.m
    result = run_baseline(
        X,
        baseline_sizes(method, n=n, p=p, d=d, **own),
        Limits(seconds=seconds, clock=time.process_time),
        activation=activation,
        weights_std=std,
        generator=torch.Generator().manual_seed(options.seed),
    )
    history = [(point.seconds, point.relfrob) for point in result.history]
    if method == "slbf":
        history = [(seconds, result.relfrob)]
    sizes = result.sizes
    shape = f"m={sizes.m} r={sizes.r}" + (f" k={sizes.atom_rank}" if sizes.atom_rank else "")
    return {"kept": result.kept, "sizes": shape, "history": history}


def machine_rate() -> float:
    """GFLOP per CPU second of a float32 product of 1024 x 1024: the best of five."""
    left, right = torch.randn(2, 1024, 1024)
    best = 0.0
    for _ in range(5):
        started = time.process_time()
        left @ right
        best = max(best, 2 * 1024**3 / (time.process_time() - started) / 1e9)
    return best


class Known:
    """Finished fits, kept in a file as they come."""

    def __init__(self, file: Path | None, *, frozen: bool) -> None:
        self.file, self.frozen = file, frozen
        self.fits = json.loads(file.read_text()) if file and file.exists() else {}

    def fit(self, key: str, seconds: float, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The fit of at least so many seconds under this key, from the file or made now; None if there is none."""
        if key in self.fits and self.fits[key]["seconds"] >= seconds:
            return dict(self.fits[key])
        if self.frozen:
            return dict(self.fits[key]) if key in self.fits else None
        about = {"seconds": seconds, "gflops": round(machine_rate(), 1), "load": os.getloadavg()[0]}
        self.fits[key] = {**about, **make()}
        if self.file:
            written = self.file.with_name(f".{self.file.name}")
            written.write_text(json.dumps(self.fits), encoding="utf-8")
            os.replace(written, self.file)
        return dict(self.fits[key])


def closed(X: Tensor, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    budget = Sizes(*X.shape, options.m, options.r).parameters
    cells = {}
    for method in _CLOSED:
        n, p, d = X.shape
        result = run_baseline(X, baseline_sizes(method, n=n, p=p, d=d, budget=budget))
        shape = f"m={result.sizes.m} r={result.sizes.r}"
        cells[str(method)] = {"kept": result.kept, "sizes": shape, "history": [(0.0, result.relfrob)]}
    return cells


def best_until(cell: dict[str, Any], seconds: float) -> float:
    return min((error for at, error in cell["history"] if at <= 1.02 * seconds), default=float("nan"))


def table(cells: dict[str, dict[str, Any]], times: list[float]) -> list[str]:
    lines = ["| method | sizes | kept | " + " | ".join(f"{t:g} s" for t in times) + " | rises |"]
    lines.append("|---" * (len(times) + 4) + "|")
    for name, cell in cells.items():
        errors = " | ".join(
            f"{best_until(cell, t):.4f}" if t <= cell.get("seconds", t) else "" for t in times
        )
        lines.append(
            f"| {name} | {cell['sizes']} | {cell['kept']:.4f} | {errors} | {cell.get('rises', '')} |"
        )
    return lines


def race(cells: dict[str, dict[str, Any]], peer: str, own: str, seconds: float) -> tuple[float, float] | None:
    """The peer's least error until then, and when one of our forms has it (inf: never); None without both."""
    goal = least(cells, _KINDS[peer], seconds)
    ours = [cells[name] for name in _KINDS[own] if name in cells]
    if goal is None or not ours:
        return None
    return goal, min(
        (at for cell in ours for at, error in cell["history"] if error <= goal), default=math.inf
    )


def least(cells: dict[str, dict[str, Any]], names: tuple[str, ...], seconds: float) -> float | None:
    """The least error of the named methods until then; None where none was run so long."""
    run = [cells[name] for name in names if name in cells]
    return min((best_until(cell, seconds) for cell in run if seconds <= cell["seconds"]), default=None)


def speed(cells: dict[str, dict[str, Any]], times: list[float]) -> str:
    """How much sooner GloBE is where MoBE ends, for the best of each at the same (m, r)."""
    found = race(cells, "MoBE", "GloBE, dense", max(times))
    if found is None:
        return ""
    goal, at = found
    if math.isinf(at):
        return f"MoBE's best at {max(times):g} s, {goal:.4f}, is not reached at the same (m, r)."
    return (
        f"MoBE's best at {max(times):g} s, {goal:.4f}, after {at:.1f} s: {max(times) / at:.1f} times sooner."
    )


def overall(banks: list[dict[str, dict[str, Any]]], times: list[float]) -> list[str]:
    """Over all matrices: mean errors, how much sooner GloBE's forms have the peers' last errors, and rises."""
    lines = [
        "| mean RelFrob | " + " | ".join(f"{t:g} s" for t in times) + " |",
        "|---" * (len(times) + 1) + "|",
    ]
    for kind, names in _KINDS.items():
        errors = [[least(cells, names, t) for cells in banks] for t in times]
        means = [None if None in column else statistics.mean(filter(None, column)) for column in errors]
        if any(means):
            lines.append(f"| {kind} | " + " | ".join(f"{one:.4f}" if one else "" for one in means) + " |")
    for peer, own in itertools.product(("MoBE", "SLBF"), ("GloBE, dense", "GloBE, low-rank")):
        races = [found for cells in banks if (found := race(cells, peer, own, max(times))) is not None]
        ratios = [max(times) / at for _, at in races if not math.isinf(at)]
        if ratios:
            lines.append(
                f"\n{own}, to {peer}'s error of {max(times):g} s: {min(ratios):.1f} to {max(ratios):.1f} times sooner, "
                f"median {statistics.median(ratios):.1f} ({len(ratios)} of {len(races)} matrices)"
            )
    ours = [cell for cells in banks for name, cell in cells.items() if name.startswith("globe")]
    steps = sum(len(cell["history"]) for cell in ours)
    return [
        *lines,
        f"\nrises of the objective: {sum(cell['rises'] for cell in ours)} in {steps} steps of GloBE",
    ]


def fit_cell(
    key: str, name: str, X: Tensor, std: float, known: Known, options: argparse.Namespace
) -> dict[str, Any] | None:
    """The row of one method: one fit of the longest time, or for SLBF one for each."""
    if name.startswith("globe"):
        return known.fit(key, max(options.times), lambda: fit_ours(name, X, options))
    if not name.startswith("slbf"):
        longest = max(options.times)
        return known.fit(key, longest, lambda: fit_theirs(name, X, std, longest, options))
    rows = []
    for limit in options.times:
        row = known.fit(
            f"{key}/{limit:g}", limit, lambda limit=limit: fit_theirs(name, X, std, limit, options)
        )
        rows += [row] if row is not None else []
    if not rows:
        return None
    history = sorted(point for row in rows for point in row["history"])
    return {**rows[-1], "history": history}


def main() -> None:
    options = arguments()
    options.times = sorted(options.times)
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.checkpoint or str(_DEFAULT))
    known = Known(options.json, frozen=options.tables)
    print(
        f"{options.threads} thread(s) of {platform.machine()}, PyTorch {torch.__version__}, CPU seconds, "
        f"load {os.getloadavg()[0]:.1f} at the start"
    )
    if ADAM_METHODS:
        load_optimiser()
    banks = []
    for layer in options.layers:
        for family in options.families:
            W = checkpoint.read_experts(layer, family).weights
            normalised = normalise(W, centre="scalar", scale="family")
            assert normalised.scale is not None
            X, std = normalised.experts, float(normalised.scale)
            cells = closed(X, options)
            key = f"{checkpoint.folder.name}/{layer}/{family}/m{options.m}r{options.r}"
            for name in options.methods:
                found = fit_cell(f"{key}/{name}", name, X, std, known, options)
                if found is not None:
                    cells[name] = found
            shape = " x ".join(str(side) for side in X.shape)
            print(f"\n{checkpoint.folder.name}, layer {layer}, {family}: {shape}\n")
            print("\n".join([*table(cells, options.times), "", speed(cells, options.times)]), flush=True)
            banks.append(cells)
    if len(banks) > 1:
        print("\n" + "\n".join(overall(banks, options.times)))


if __name__ == "__main__":
    try:
        main()
    except GlobeError as error:
        sys.exit(f"{error}")
