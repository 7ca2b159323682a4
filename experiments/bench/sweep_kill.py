"""Kill -9 a sweep at random moments, again and again: does it end complete, with each run counted once?

    python experiments/bench/sweep_kill.py                                  # 12 runs, 5 kills, one run after another
    python experiments/bench/sweep_kill.py --launcher joblib                # two at once
    python experiments/bench/sweep_kill.py --seeds 1 --kills 2 --steps 4    # 3 runs

One sweep (bank.m = n/8, n/4, n/2 times seeds, on the embedded model) is left alone. A second one is started in a fresh
folder, and its whole process group is killed with SIGKILL; the same command then goes on, is killed again, and so on.
In the end the command is left to finish. The moments are drawn over the sweep, as numbers of steps in its metrics.jsonl
files and a random part of a step after them, so that they do not depend on how busy the machine is. A kill that comes
too late all the same is said and fails.

It passes when the last command ends with exit code 0; the sweep has exactly the folders of the undisturbed one; each
run is `finished`, has the same bytes in `bank.safetensors` and `globe.json`, each step once and the same figures (times
apart); every JSON file can be read; and nothing is left over. Exit code 1 unless all of this holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_resume import await_moment, files, load, steps, untimed

_LAST = 0.9
"""Part of the sweep by which the last kill has come: what follows takes longer than to notice the moment."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=4, help="times three sizes make the runs")
    parser.add_argument("--steps", type=int, default=40, help="of a fit; a checkpoint is written after each")
    parser.add_argument("--launcher", default="basic", help="basic, joblib or submitit_local")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    seeds = ",".join(map(str, range(options.seeds)))
    command = [
        *("-m", "bank.m=n/8,n/4,n/2", f"seed={seeds}", f"train.steps={options.steps}", "sweep=runs"),
        *("train.patience=0", "train.checkpoint_every=0", f"hydra/launcher={options.launcher}"),
    ]
    if options.launcher != "basic":
        command.append("hydra.launcher.n_jobs=2")
    with tempfile.TemporaryDirectory(prefix="globe-sweep-kill-") as root:
        whole, broken = Path(root) / "whole", Path(root) / "broken"
        total, seconds = undisturbed(command, whole)
        generator = random.Random(options.seed)
        late = 0
        for number, share in enumerate(moments(generator, options.kills), 1):
            early = killed_at(command, broken, share * total, generator.uniform(0.0, seconds / total))
            late += not early
            when = "" if early else ", TOO LATE"
            print(f"kill {number} after {recorded(broken)} of {total} steps: {census(broken)}{when}")
        process, log = start(command, broken)
        code = process.wait()
        print(f"left alone: exit code {code}, {census(broken)}")
        wrong = compare(broken / "runs", whole / "runs") if code == 0 else [log.read_text()[-500:]]
    wrong += ["a kill came too late"] * late
    for one in wrong:
        print(f"  {one}")
    runs = 3 * options.seeds
    print(
        f"{'FAIL' if wrong else 'PASS'}: {runs} runs, {options.kills} kills, {options.launcher} launcher; undisturbed "
        f"{seconds:.1f} s from the first step to the last"
    )
    return 1 if wrong else 0


def start(command: list[str], folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """`python -m globe.train COMMAND` in a process group of its own."""
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "globe.train", *command, f"output={folder}"],
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,
        )
    return process, log


def undisturbed(command: list[str], folder: Path) -> tuple[int, float]:
    """Steps of the sweep, and the seconds from the first to the end."""
    process, log = start(command, folder)
    await_moment(process, lambda: recorded(folder) > 0)
    clock = time.perf_counter()
    if process.wait() != 0:
        sys.exit(f"the undisturbed sweep failed:\n{log.read_text()}")
    return recorded(folder), time.perf_counter() - clock


def moments(generator: random.Random, kills: int) -> list[float]:
    """Parts of a sweep, ascending: a random one in each of as many equal parts, short of the end."""
    return [_LAST * (number + generator.random()) / kills for number in range(kills)]


def killed_at(command: list[str], folder: Path, steps: float, seconds: float) -> bool:
    """Kill the group that long after so many steps are recorded. Was that before the command was done?"""
    process, _ = start(command, folder)
    await_moment(process, lambda: recorded(folder) >= steps)
    time.sleep(seconds)
    early = process.poll() is None
    if early:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return early


def recorded(folder: Path) -> int:
    """Steps in the metrics of all runs."""
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("runs/*/metrics.jsonl"))


def census(folder: Path) -> str:
    """How many runs are in which state."""
    found = [json.loads(file.read_text())["state"] for file in folder.glob("runs/*/status.json")]
    return ", ".join(f"{found.count(state)} {state}" for state in sorted(set(found))) or "nothing yet"


def compare(broken: Path, whole: Path) -> list[str]:
    """What is not as in the undisturbed sweep."""
    mine, theirs = ({one.parent.name for one in folder.glob("*/status.json")} for folder in (broken, whole))
    wrong = [f"{name} is there in one sweep only" for name in sorted(mine ^ theirs)]
    counted = [load(broken / name) for name in mine if (broken / name / "summary.json").exists()]
    if len(counted) != len(theirs):
        wrong.append(f"{len(counted)} summaries for {len(theirs)} runs")
    for name in sorted(mine & theirs):
        here, there = broken / name, whole / name
        state = json.loads((here / "status.json").read_text())["state"]
        if state != "finished":
            wrong.append(f"{name} is {state}")
            continue
        if odd := files(here) ^ files(there):
            wrong.append(f"{name}: {', '.join(sorted(odd))} in one sweep only")
        for file in sorted(here.rglob("*.json")):
            json.loads(file.read_text())
        same = [file for file in there.rglob("*") if file.name in ("bank.safetensors", "globe.json")]
        different = [
            file for file in same if (here / file.relative_to(there)).read_bytes() != file.read_bytes()
        ]
        wrong += [f"{name}: {file.name} differs" for file in different]
        if steps(here) != steps(there):
            wrong.append(f"{name}: metrics.jsonl differs")
        if untimed(load(here)) != untimed(load(there)):
            wrong.append(f"{name}: summary.json differs")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
