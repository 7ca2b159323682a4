"""Kill -9 a sweep at random moments, again and again: does it end complete, with each run counted once?

    python experiments/bench/sweep_kill.py                                  # 12 runs, 5 kills, one run after another
    python experiments/bench/sweep_kill.py --launcher joblib                # two at once
    python experiments/bench/sweep_kill.py --seeds 1 --kills 2 --steps 4    # 3 runs

One sweep (bank.m = n/8, n/4, n/2 times seeds, on the embedded model) is left alone. A second one is started in a fresh
folder, and its whole process group is killed with SIGKILL at a random moment; the same command then goes on, is killed
again, and so on. In the end the command is left to finish. Every attempt works on fits for a random part, up to twice
an even one, of the CPU seconds that the fits of the undisturbed sweep took, so that the kills are spread over the
sweep; a kill that comes too late all the same is said and fails.

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

_TICK = 0.01


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
        startup, seconds = undisturbed(command, whole)
        generator = random.Random(options.seed)
        rows = []
        for number in range(1, options.kills + 1):
            share = generator.uniform(0.0, 2.0) * (seconds - startup) / (options.kills + 1)
            early = killed_after(command, broken, share)
            rows.append(early)
            print(
                f"kill {number} after {share:.2f} CPU s of fits: {census(broken)}{'' if early else ', TOO LATE'}"
            )
        process, log = start(command, broken)
        code = process.wait()
        print(f"left alone: exit code {code}, {census(broken)}")
        wrong = compare(broken / "runs", whole / "runs") if code == 0 else [log.read_text()[-500:]]
    wrong += ["a kill came too late"] * rows.count(False)
    for one in wrong:
        print(f"  {one}")
    runs = 3 * options.seeds
    print(
        f"{'FAIL' if wrong else 'PASS'}: {runs} runs, {options.kills} kills, {options.launcher} launcher; undisturbed "
        f"{seconds:.1f} CPU s, {startup:.1f} of them before the first fit"
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


def undisturbed(command: list[str], folder: Path) -> tuple[float, float]:
    """CPU seconds of the group until the first fit, and in all."""
    process, log = start(command, folder)
    await_moment(process, lambda: any(folder.glob("runs/*/status.json")))
    startup = used = group_seconds(process.pid)
    while process.poll() is None:
        used = max(used, group_seconds(process.pid))
        time.sleep(_TICK)
    if process.returncode != 0:
        sys.exit(f"the undisturbed sweep failed:\n{log.read_text()}")
    return startup, used


def killed_after(command: list[str], folder: Path, seconds: float) -> bool:
    """Kill the group that long after the first fit that it does anything to. Was that before the command was done?"""
    before = progress(folder)
    process, _ = start(command, folder)
    await_moment(process, lambda: progress(folder) != before)
    begun = group_seconds(process.pid)
    await_moment(process, lambda: group_seconds(process.pid) >= begun + seconds)
    early = process.poll() is None
    if early:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return early


def progress(folder: Path) -> list[tuple[str, int]]:
    """The runs' status files and when they were written; a run that is only reported writes none."""
    return sorted((file.parent.name, file.stat().st_mtime_ns) for file in folder.glob("runs/*/status.json"))


def group_seconds(group: int) -> float:
    """CPU seconds of all processes of a group that are alive."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


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
