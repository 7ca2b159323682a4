"""GloBE against every baseline at the same kept parameters, error by time: `make bench-fit`.

    python experiments/bench/fit.py                                   # globe-ref, layers 0-3, up and gate; hours
    python experiments/bench/fit.py --layers 1 --families up --times 10 30 60 120
    python experiments/bench/fit.py CHECKPOINT --layers 12 --m 4 --r 22 --times 1 3 10
    python experiments/bench/fit.py --mobe-script MoBE/train.py       # and MoBE's public script

Every method gets its own fit of the longest time, on one thread, counted in CPU seconds, so that other work on the
machine falls on nobody; SLBF, whose cosine ends with its time, gets one for each time. The budget is that of a bank of
m dense atoms with r rows. GloBE runs at that (m, r) and in the free form with as many low-rank atoms as experts. Closed
forms have one error. `rises` counts accepted steps after which the objective was higher (all schedules stand still).

Finished fits are kept in --json and not repeated, so the hours can be split; --tables prints what is known and fits
nothing. Each fit is preceded by a product of fixed size, whose rate is kept with it: equal rates, equal machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from fit_tables import OURS, SCRIPT, THEIRS, overall, speed, table
from mobe_script import script_history
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.records import Sizes, StepRecord
from globe.baselines import Limits, run_baseline
from globe.baselines.adam import load_optimiser
from globe.baselines.budget import resolve_sizes as baseline_sizes
from globe.checkpoint import open_checkpoint
from globe.config.choices import ADAM_METHODS, Activation, Method
from globe.config.fit_options import CurveConfig
from globe.config.schema import Config
from globe.errors import GlobeError
from globe.fit.normalise import normalise
from globe.fit.options import fit_options

_DEFAULT = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "globe-ref"
_CLOSED = (Method.svd, Method.shared_basis, Method.mean_svd)


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
    parser.add_argument("--methods", nargs="+", choices=(*OURS, *THEIRS, *SCRIPT), help="left out: all")
    parser.add_argument(
        "--mobe-script", type=Path, help="train.py of MoBE's public repository, fetched by you"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file of finished fits, read and extended")
    parser.add_argument("--tables", action="store_true", help="print what --json knows, fit nothing")
    options = parser.parse_args()
    options.methods = options.methods or [*OURS, *THEIRS, *(SCRIPT if options.mobe_script else ())]
    if not options.tables and options.mobe_script is None and set(options.methods) & set(SCRIPT):
        parser.error("--methods mobe_script needs --mobe-script FILE, the train.py of MoBE's repository")
    return options


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


def fit_script(name: str, W: Tensor, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """The row of MoBE's own script, on the weights as the checkpoint has them."""
    sizes = Sizes(*W.shape, options.m, options.r)
    history = script_history(
        options.mobe_script,
        W,
        m=sizes.m,
        r=sizes.r,
        activation=name.split()[1],
        seconds=seconds,
        threads=options.threads,
    )
    return {"kept": sizes.kept, "sizes": f"m={sizes.m} r={sizes.r}", "history": history}


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


def fit_cell(
    key: str, name: str, W: Tensor, known: Known, options: argparse.Namespace
) -> dict[str, Any] | None:
    """The row of one method: one fit of the longest time, or for SLBF one for each."""
    longest = max(options.times)
    if name in SCRIPT:
        return known.fit(key, longest, lambda: fit_script(name, W, longest, options))
    normalised = normalise(W, centre="scalar", scale="family")
    assert normalised.scale is not None
    X, std = normalised.experts, float(normalised.scale)
    if name.startswith("globe"):
        return known.fit(key, longest, lambda: fit_ours(name, X, options))
    if not name.startswith("slbf"):
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
            cells = closed(normalise(W, centre="scalar", scale="family").experts, options)
            key = f"{checkpoint.folder.name}/{layer}/{family}/m{options.m}r{options.r}"
            for name in options.methods:
                found = fit_cell(f"{key}/{name}", name, W, known, options)
                if found is not None:
                    cells[name] = found
            shape = " x ".join(str(side) for side in W.shape)
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
