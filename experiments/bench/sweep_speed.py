"""How much faster is a sweep with runs side by side? Throughput of `hydra/launcher=joblib` against one after another.

    python experiments/bench/sweep_speed.py                         # 12 runs of 300 steps, 2 workers, two rounds
    python experiments/bench/sweep_speed.py --steps 100             # runs of a second
    python experiments/bench/sweep_speed.py --also fork=false       # joblib's own processes as well

The same sweep (bank.m = n/8, n/4, n/2 times seeds, embedded model, layer 12, up) is run from fresh folders by the two
launchers in turn. Seconds are those of the whole command, start of Python and of the workers included; the best round
counts, since other work on the machine only ever adds. Needs as many idle cores as workers: says how loaded they were.
Exit code 1 below the target of 1.6 times the throughput with 2 workers.

In the same rounds, what the machine allows: processes that have nothing in common and were started before, each on a
core of its own, do the same fits, first one alone and then all together. Cores that share caches, memory or (of a
virtual machine) a physical core do less than so many times as much. The bound divides the time after the first run
began as far as that; the time before (Python, PyTorch, Hydra's check of every run) can't be divided.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = 0.8
"""of the number of workers: 1.6 for two"""
GRID = ("n/8", "n/4", "n/2")
_TICK = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=4, help="times three sizes make the runs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--also", nargs="*", default=[], help="joblib again, with this option of hydra.launcher"
    )
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--fit-in", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit_in:
        return fit_when_told(Path(options.fit_in), options.steps)
    cores = sorted(os.sched_getaffinity(0))
    print(f"{len(cores)} cores, load {os.getloadavg()[0]:.2f} before")
    joblib = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={options.workers}"]
    launchers = {"basic": ["hydra/launcher=basic"], "joblib": joblib}
    launchers |= {f"joblib {extra}": [*joblib, f"hydra.launcher.{extra}"] for extra in options.also}
    seconds: dict[str, list[float]] = {name: [] for name in ("one process", "all processes", *launchers)}
    errors: dict[str, list[float]] = {}
    starts: list[float] = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="globe-sweep-speed-") as root:
            for name, used in (("one process", 1), ("all processes", options.workers)):
                seconds[name].append(independent(Path(root), cores[:used], options.steps))
                print(f"{name}: {seconds[name][-1]:.1f} s")
        for name, extra in launchers.items():
            with tempfile.TemporaryDirectory(prefix="globe-sweep-speed-") as root:
                start, whole = timed(extra, Path(root), options)
                seconds[name].append(whole)
                if name == "basic":
                    starts.append(start)
                errors[name] = sorted(
                    json.loads(file.read_text())["relfrob"] for file in Path(root).glob("runs/*/summary.json")
                )
            print(f"{name}: {whole:.1f} s, the first run after {start:.1f} s")
    best = {name: min(times) for name, times in seconds.items()}
    ceiling = options.workers * best["one process"] / best["all processes"]
    bound = best["basic"] / (min(starts) + (best["basic"] - min(starts)) / ceiling)
    print(
        f"independent processes do {ceiling:.2f} times the fits of one; this bounds the sweep by {bound:.2f}"
    )
    runs = len(GRID) * options.seeds
    same = all(found == errors["basic"] and len(found) == runs for found in errors.values())
    for name in list(launchers)[2:]:
        print(f"{name}: {best['basic'] / best[name]:.2f} times the runs of one")
    ratio = best["basic"] / best["joblib"]
    good = same and ratio >= TARGET * options.workers
    print(
        f"{'PASS' if good else 'FAIL'}: {options.workers} workers do {ratio:.2f} times the runs of one "
        f"({runs} runs of {options.steps} steps, target {TARGET * options.workers:.1f}); "
        f"{'the same' if same else 'OTHER'} errors"
    )
    if options.json:
        record = {"seconds": seconds, "ratio": ratio, "ceiling": ceiling, "bound": bound, "cores": len(cores)}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return kept | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def timed(extra: list[str], root: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a sweep until its first run begins, and in all."""
    command = [
        *("-m", f"bank.m={','.join(GRID)}", f"seed={','.join(map(str, range(options.seeds)))}", "sweep=runs"),
        *(f"train.steps={options.steps}", "train.patience=0", f"output={root}", *extra),
    ]
    clock, start = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "globe.train", *command], stdout=said, stderr=said, env=environment()
        )
        while process.poll() is None:
            if start is None and any(root.glob("runs/*/status.json")):
                start = time.perf_counter() - clock
            time.sleep(_TICK)
        whole = time.perf_counter() - clock
        if process.returncode != 0 or start is None:
            said.seek(0)
            sys.exit(said.read())
    return start, whole


def independent(root: Path, cores: list[int], steps: int) -> float:
    """Seconds in which a process on each of the cores, started and warm, does one fit of each size."""
    processes = []
    for core in cores:
        command = [
            sys.executable,
            __file__,
            "--fit-in",
            str(root / f"{len(cores)}-{core}"),
            "--steps",
            str(steps),
        ]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        os.sched_setaffinity(process.pid, {core})
        processes.append(process)
    for process in processes:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "ready\n":
            assert line, "it ended before it was ready"
    clock = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        assert process.wait() == 0
    return time.perf_counter() - clock


def fit_when_told(folder: Path, steps: int) -> int:
    """Be ready, wait for the end of the input, then do the fits."""
    import torch
    from hydra import compose, initialize_config_dir

    from globe.config.composition import conf_dir
    from globe.train import run

    torch.set_num_threads(1)
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        warm, *nodes = [
            compose("config", overrides=[f"bank.m={m}", f"train.steps={count}", "train.patience=0"])
            for m, count in (("n/8", 1), *((m, steps) for m in GRID))
        ]
    run(warm, folder / "warm")
    print("ready", flush=True)
    sys.stdin.read()
    for number, node in enumerate(nodes):
        run(node, folder / str(number))
    return 0


if __name__ == "__main__":
    sys.exit(main())
