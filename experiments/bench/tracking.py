"""What does watching a fit cost? Time per step with wandb offline, a slow tracker and a broken one, against none.

    python experiments/bench/tracking.py                          # 120 steps of the embedded model, three rounds
    python experiments/bench/tracking.py --steps 20 --rounds 1

The same fit (embedded model, layer 12, up, one thread) is run in one process with each kind of tracker in turn, round
after round, so that a machine that is busy for a while is busy for all of them. Three figures for each:

- in the step: seconds that the fit's own thread spends handing its figures over, as a share of the step. This is what a
  tracker holds up directly, and repeats well.
- beside it: how much longer the whole step takes than with no tracker. The tracker's thread and wandb's own process
  take a share of the cores too; on a busy machine this one is noise of several per cent.
- end: seconds that the end of the run waits for what is not yet written; at most `wandb.patience`.

Exit code 1 if one of the first shares is above the target of 2 per cent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGET = 0.02
NAMES = ("disabled", "offline", "slow", "failing")


@dataclass
class Timed:
    """All sinks of one run, with a watch on what they take."""

    sinks: Any
    seconds: list[float] = field(default_factory=list)
    """of each call, on the fit's thread"""
    moments: list[float] = field(default_factory=list)
    """when each step was over"""
    end: float = 0.0

    def log(self, bank: str, step: int, values: Mapping[str, Any]) -> None:
        clock = time.perf_counter()
        self.sinks.log(bank, step, values)
        after = time.perf_counter()
        self.seconds.append(after - clock)
        self.moments.append(after)

    def finish(self, summary: Mapping[str, Any], *, state: str) -> None:
        clock = time.perf_counter()
        self.sinks.finish(summary, state=state)
        self.end = time.perf_counter() - clock


class Slow:
    """A tracker that takes `delay` seconds for everything."""

    def __init__(self, delay: float) -> None:
        self.delay = delay

    def open(self, run: Any) -> None:
        time.sleep(self.delay)

    def log(self, bank: str, step: int, values: Mapping[str, Any]) -> None:
        time.sleep(self.delay)

    def finish(self, summary: Mapping[str, Any], *, state: str) -> None:
        time.sleep(self.delay)


class Failing(Slow):
    """A tracker that takes its time and breaks."""

    def log(self, bank: str, step: int, values: Mapping[str, Any]) -> None:
        time.sleep(self.delay)
        raise ConnectionError("the tracker is gone")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.2, help="seconds of a call of the slow tracker")
    parser.add_argument("--patience", type=float, default=5.0, help="wandb.patience of all of them")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")

    steps: dict[str, list[float]] = {name: [] for name in NAMES}
    calls: dict[str, list[float]] = {name: [] for name in NAMES}
    ends: dict[str, float] = dict.fromkeys(NAMES, 0.0)
    with tempfile.TemporaryDirectory(prefix="globe-tracking-") as root:
        for number in range(options.rounds):
            for name in NAMES:
                watch = one_run(name, Path(root) / f"{number}-{name}", options)
                steps[name] += [b - a for a, b in zip(watch.moments, watch.moments[1:], strict=False)]
                calls[name] += watch.seconds[1:]
                ends[name] = max(ends[name], watch.end)
    rows = {name: figures(steps[name], calls[name], steps["disabled"]) for name in NAMES}
    return report(rows, ends, options)


def one_run(name: str, folder: Path, options: argparse.Namespace) -> Timed:
    from hydra import compose, initialize_config_dir

    import globe.train
    from globe.config import conf_dir
    from globe.tracking import Background, Fanout, Guarded, open_sinks

    watches: list[Timed] = []

    def opened(config: Any, metrics: Path, run: Any) -> Any:
        sinks = open_sinks(config, metrics, run)
        if name in ("slow", "failing"):
            tracker = Slow(options.delay) if name == "slow" else Failing(options.delay)
            added = Background(Guarded(tracker), patience=options.patience)
            added.open(run)
            sinks = Fanout([*sinks.sinks, added])
        watches.append(Timed(sinks))
        return watches[0]

    overrides = [f"train.steps={options.steps}", "train.patience=0", "threads=1"]
    overrides += [f"wandb={'offline' if name == 'offline' else 'disabled'}"]
    overrides += [f"wandb.patience={options.patience}"]
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        node = compose("config", overrides=overrides)
    globe.train.open_sinks = opened
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            globe.train.run(node, folder)
    finally:
        globe.train.open_sinks = open_sinks
    return watches[0]


def figures(steps: list[float], calls: list[float], without: list[float]) -> dict[str, float]:
    step = statistics.median(steps)
    return {
        "step_ms": 1e3 * step,
        "call_us": 1e6 * statistics.mean(calls),
        "in_the_step": statistics.mean(calls) / statistics.mean(steps),
        "beside_it": step / statistics.median(without) - 1,
    }


def report(rows: dict[str, dict[str, float]], ends: dict[str, float], options: argparse.Namespace) -> int:
    print("| tracker | ms per step | us per call | in the step | beside it | end, s |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        beside = "" if name == "disabled" else f"{row['beside_it']:+.1%}"
        print(
            f"| {name} | {row['step_ms']:.2f} | {row['call_us']:.0f} | {row['in_the_step']:.2%} | {beside} | "
            f"{ends[name]:.2f} |"
        )
    worst = max(row["in_the_step"] for row in rows.values())
    good = worst <= TARGET
    print(
        f"{'PASS' if good else 'FAIL'}: at most {worst:.2%} of a step is spent on telling its figures, target "
        f"{TARGET:.0%} ({options.steps} steps, {options.rounds} rounds, slow means {options.delay:g} s a call)"
    )
    if options.json:
        record = {name: row | {"end_s": ends[name]} for name, row in rows.items()}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
