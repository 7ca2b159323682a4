"""What does watching a fit cost? Time per step with wandb offline, a slow tracker and a broken one, against none.

    python experiments/bench/tracking.py                          # 120 steps of the embedded model, three rounds
    python experiments/bench/tracking.py --steps 20 --rounds 1

The same fit (embedded model, layer 12, up, one thread) is run in one process with each kind of tracker in turn, round
after round, so that a machine that is busy for a while is busy for all of them. A round before the others, which
imports wandb and starts its process, is not counted, nor is the first third of each run, while its tracker opens.

- held up: median seconds that the fit's own thread spends handing its figures over, as a share of the median step. A
  tracker that made steps wait would show here.
- CPU: CPU seconds of that thread for the same, as a share of those of the steps. Other work on the machine does not
  count.
- beside it: how much longer the whole step takes than with no tracker. The tracker's thread and wandb's own process
  take a share of the cores too; on a busy machine this one is noise of several per cent, or much more.
- end: seconds that the end of the run waits for what is not yet written; at most `wandb.patience`.

`disabled` is what `metrics.jsonl` takes, which is written in the step. `direct` is wandb offline called from the step
itself, to see what its thread is good for; it does not count. Exit code 1 if one of the first two shares is more than
2 per cent above `disabled` for any other tracker.
"""

from __future__ import annotations

import argparse
import itertools
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
NAMES = ("disabled", "offline", "direct", "slow", "failing")


@dataclass
class Timed:
    """All sinks of one run, with a watch on what they take."""

    sinks: Any
    seconds: list[float] = field(default_factory=list)
    """of each call, on the fit's thread"""
    cpu: list[float] = field(default_factory=list)
    """the same, CPU seconds of the thread"""
    cpu_moments: list[float] = field(default_factory=list)
    """CPU seconds of the process when each step was over"""
    moments: list[float] = field(default_factory=list)
    """when each step was over"""
    end: float = 0.0

    def log(self, bank: str, step: int, values: Mapping[str, Any]) -> None:
        clock, cpu = time.perf_counter(), time.thread_time()
        self.sinks.log(bank, step, values)
        after = time.perf_counter()
        self.cpu.append(time.thread_time() - cpu)
        self.cpu_moments.append(time.thread_time())
        self.seconds.append(after - clock)
        self.moments.append(after)

    def drop(self, first: int) -> None:
        for records in (self.seconds, self.cpu, self.moments, self.cpu_moments):
            del records[:first]

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
    parser.add_argument("--patience", type=float, default=60.0, help="wandb.patience of all of them")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")

    watches: dict[str, list[Timed]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory(prefix="globe-tracking-") as root:
        for number in range(options.rounds + 1):
            for name in NAMES:
                watches[name].append(one_run(name, Path(root) / f"{number}-{name}", options))
    for name in NAMES:
        del watches[name][0]  # imports of wandb, and the start of its process, once and not by step
        for watch in watches[name]:
            watch.drop(options.steps // 3)  # while the tracker opens
    without = statistics.median(durations(watches["disabled"]))
    return report({name: figures(watches[name], without) for name in NAMES}, options)


def one_run(name: str, folder: Path, options: argparse.Namespace) -> Timed:
    from hydra import compose, initialize_config_dir

    import globe.train
    from globe.config.choices import WandbMode
    from globe.config.composition import conf_dir
    from globe.config.schema import WandbConfig
    from globe.runs.tracking import Background, Fanout, Guarded, WandbSink, open_sinks

    watches: list[Timed] = []

    def opened(config: Any, metrics: Path, run: Any) -> Any:
        sinks = open_sinks(config, metrics, run)
        if name in ("slow", "failing"):
            tracker = Slow(options.delay) if name == "slow" else Failing(options.delay)
            added = Background(Guarded(tracker), patience=options.patience)
            added.open(run)
            sinks = Fanout([*sinks.sinks, added])
        if name == "direct":
            added = Guarded(WandbSink(WandbConfig(mode=WandbMode.offline)))
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


def durations(watches: list[Timed]) -> list[float]:
    """Of all steps but the first of each run."""
    return [after - before for one in watches for before, after in itertools.pairwise(one.moments)]


def figures(watches: list[Timed], without: float) -> dict[str, float]:
    """`without` is the median step with no tracker."""
    step = statistics.median(durations(watches))
    call = statistics.median(second for one in watches for second in one.seconds[1:])
    spent = sum(sum(one.cpu[1:]) for one in watches)
    return {
        "step_ms": 1e3 * step,
        "call_us": 1e6 * call,
        "held_up": call / step,
        "cpu": spent / sum(one.cpu_moments[-1] - one.cpu_moments[0] for one in watches),
        "beside_it": step / without - 1,
        "end_s": max(one.end for one in watches),
    }


def report(rows: dict[str, dict[str, float]], options: argparse.Namespace) -> int:
    print("| tracker | ms per step | us per call | held up | CPU | beside it | end, s |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        beside = "" if name == "disabled" else f"{row['beside_it']:+.1%}"
        print(
            f"| {name} | {row['step_ms']:.2f} | {row['call_us']:.0f} | {row['held_up']:.2%} | {row['cpu']:.2%} | "
            f"{beside} | {row['end_s']:.2f} |"
        )
    none = rows["disabled"]
    worst = max(
        row[share] - none[share]
        for name, row in rows.items()
        if name != "direct"
        for share in ("held_up", "cpu")
    )
    good = worst <= TARGET
    print(
        f"{'PASS' if good else 'FAIL'}: a tracker takes at most {worst:.2%} of a step, target {TARGET:.0%} "
        f"({options.steps} steps, {options.rounds} rounds, slow means {options.delay:g} s a call)"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
