"""Kill -9 at random moments of a whole-model run: does every resume end where the undisturbed run does?

    python experiments/bench/kill_resume.py                               # 20 kills, four layers, up and gate
    python experiments/bench/kill_resume.py --kills 3 --layers 2 --steps 4

One run is left alone. Then each trial starts the same command in a fresh folder, kills it with SIGKILL and gives the
command again. A third of the moments is drawn from the start-up and a third from the time after it, both in seconds
of the process' CPU time, so that a busy machine moves none (needs Linux). A third is drawn from the file operations of
the run (opening for writing, renaming, removing, making a folder): the process kills itself right before that one.
These are the moments at which something could be half written, and too short to meet by chance.

A trial passes when the second command ends with exit code 0, every `bank.safetensors` and `globe.json` has the bytes
of the undisturbed run, `metrics.jsonl` has each step of each bank once, in order and with the same figures (times
apart), `summary.json` says the same (times apart), and no other file is left over. Exit code 1 unless all pass.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_PATIENCE = 1800.0
"""Seconds after which a run is given up; only a hang gets there."""
_TICK = 0.005
_OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


@dataclass(frozen=True)
class Moment:
    """When a process dies."""

    how: str
    """start-up and fits: at a CPU time; file: before a file operation"""
    share: float
    """of the start-up, of the time after it, or of all file operations"""


@dataclass(frozen=True)
class Outline:
    """Of the undisturbed run."""

    folder: Path
    startup: float
    """CPU seconds until its folder says that it runs"""
    rest: float
    """CPU seconds from there to the end"""
    operations: int


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4, help="of the embedded model, both families")
    parser.add_argument("--steps", type=int, default=12, help="of a fit; a checkpoint is written after each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--option", action="append", default=[], help="a further option of globe.train")
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    console = Console(width=140)
    table = Table(
        "", "killed in", "at", "had", "second run", "artefacts", "steps", "summary", "left over", ""
    )
    with tempfile.TemporaryDirectory(prefix="globe-kill-") as root:
        command = [
            *("family=both", f"layer=0-{options.layers - 1}", f"train.steps={options.steps}"),
            *("train.patience=0", "train.checkpoint_every=0", "threads=1", *options.option),
        ]
        whole = undisturbed(command, Path(root) / "whole")
        rows = []
        for number, moment in enumerate(moments(options.kills, random.Random(options.seed)), start=1):
            row = trial(command, Path(root) / f"trial{number}", moment, whole)
            rows.append(row)
            table.add_row(str(number), *(str(cell) for cell in row.values()))
    console.print(table)
    passed = sum(row["verdict"] == "pass" for row in rows)
    settings = f"{options.layers} layers, up and gate, {options.steps} steps, seed {options.seed}"
    console.print(
        f"{'PASS' if passed == len(rows) else 'FAIL'}: {passed} of {len(rows)} kills "
        f"({settings}; undisturbed {whole.startup:.1f} CPU s start-up, {whole.rest:.1f} after it, "
        f"{whole.operations} file operations)"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if passed == len(rows) else 1


def moments(kills: int, generator: random.Random) -> Iterator[Moment]:
    """Stratified, so that few kills are spread as well: one in each of equal parts of its kind's range."""
    kinds = ("start-up", "fits", "file")
    counts = [len(range(first, kills, len(kinds))) for first in range(len(kinds))]
    for number in range(kills):
        part, kind = divmod(number, len(kinds))
        yield Moment(kinds[kind], (part + generator.random()) / counts[kind])


def undisturbed(command: list[str], folder: Path) -> Outline:
    process, log = start(command, folder, die_at=0)
    await_moment(process, lambda: (folder / "status.json").exists())
    startup = used = cpu_seconds(process)
    while process.poll() is None:
        used = cpu_seconds(process) or used
        time.sleep(_TICK)
    if process.returncode != 0:
        sys.exit(f"the undisturbed run failed:\n{log.read_text()}")
    return Outline(folder, startup, used - startup, int(counter(folder).read_text()))


def trial(command: list[str], folder: Path, moment: Moment, whole: Outline) -> dict[str, Any]:
    """One kill and one resumption."""
    at = max(1, round(moment.share * whole.operations)) if moment.how == "file" else None
    process, log = start(command, folder, die_at=at)
    match moment.how:
        case "start-up":
            where = moment.share * whole.startup
            await_moment(process, lambda: cpu_seconds(process) >= where)
        case "fits":
            where = whole.startup + moment.share * whole.rest
            await_moment(process, lambda: cpu_seconds(process) >= where)
        case _:
            process.wait(_PATIENCE)
    early = process.poll() is None or process.returncode == -signal.SIGKILL
    process.kill()
    process.wait(_PATIENCE)
    what = f"{where:.2f} CPU s" if at is None else f"{at}: {counter(folder).read_text()}"
    had = progress(folder) if early else "was finished"
    process, log = start(command, folder)
    code = process.wait(_PATIENCE)
    row: dict[str, Any] = {"how": moment.how, "at": what, "had": had, "second run": f"exit {code}"}
    row |= compare(folder, whole.folder) if code == 0 else {"why": log.read_text()[-300:]}
    good = code == 0 and all(row[name] == "same" for name in ("artefacts", "steps", "summary"))
    return row | {"verdict": "pass" if good and row["left over"] == "nothing" else "FAIL"}


def start(
    command: list[str], folder: Path, die_at: int | None = None
) -> tuple[subprocess.Popen[bytes], Path]:
    """`python -m globe.train COMMAND`; with `die_at` it counts its file operations, and dies before that one."""
    program = ["-m", "globe.train"] if die_at is None else [__file__, "--worker", str(die_at), str(folder)]
    log = folder.with_name(f"{folder.name}.log")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *program, *command, f"hydra.run.dir={folder}"],
            stdout=stream,
            stderr=stream,
            env=environment,
        )
    return process, log


def await_moment(process: subprocess.Popen[bytes], come: Callable[[], bool]) -> None:
    while not come() and process.poll() is None:
        time.sleep(_TICK)


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """Of all its threads so far; 0 when it is gone."""
    try:
        text = Path(f"/proc/{process.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def counter(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.operations")


def progress(folder: Path) -> str:
    """What a killed run left."""
    if not (folder / "status.json").exists():
        return "nothing" if not folder.exists() else "a folder"
    banks = json.loads((folder / "status.json").read_text())["banks"]
    states = list(folder.glob("banks/*.partial/state.json"))
    step = json.loads(states[0].read_text())["step"] if states else 0
    finished = sum(bank["state"] == "finished" for bank in banks.values())
    return f"{finished} banks" + (f", step {step}" if states else "")


def compare(folder: Path, whole: Path) -> dict[str, str]:
    def verdict(same: bool) -> str:
        return "same" if same else "DIFFERENT"

    mine, theirs = files(folder), files(whole)
    kept = [name for name in theirs if name.endswith(("bank.safetensors", "globe.json"))]
    equal = all(
        (folder / name).is_file() and (folder / name).read_bytes() == (whole / name).read_bytes()
        for name in kept
    )
    odd = sorted(mine ^ theirs)
    return {
        "artefacts": verdict(bool(kept) and equal),
        "steps": verdict(steps(folder) == steps(whole)),
        "summary": verdict(untimed(load(folder)) == untimed(load(whole))),
        "left over": ", ".join(odd) or "nothing",
    }


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def load(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in ("name", "runtimes")}


def steps(folder: Path) -> list[Any]:
    return [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(record: Any) -> Any:
    """Without times, and without what was measured of this process."""
    if isinstance(record, list):
        return [untimed(one) for one in record]
    if not isinstance(record, dict):
        return record
    kept = {key: value for key, value in record.items() if "second" not in key and key != "runtime"}
    return {key: untimed(value) for key, value in kept.items()}


def worker(die_at: int, folder: Path, run: Callable[[], None]) -> None:
    """Run, and die by SIGKILL before the file operation of that number in the folder; 0 only counts them."""
    done = 0
    record = counter(folder)

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            path, _, flags = details
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in _OPERATIONS:
            path = details[1] if event == "os.rename" else details[0]
        else:
            return
        if not isinstance(path, str | os.PathLike) or not Path(path).is_relative_to(folder):
            return
        done += 1
        if done == die_at:
            name = f"{event.removeprefix('os.')} {Path(path).relative_to(folder)}"
            with open(record, "w", encoding="utf-8") as file:
                file.write(name)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run()
    record.write_text(str(done), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        from globe.train import main as train

        at, where = int(sys.argv[2]), Path(sys.argv[3])
        sys.argv = ["globe.train", *sys.argv[4:]]
        worker(at, where, train)
    else:
        sys.exit(main())
