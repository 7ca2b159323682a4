"""Hostile checkpoints, runs, compact checkpoints and caches, given to every command as a person would type it.

    python experiments/torture/commands.py [--inputs 300] [--seed 0] [--only CASE] [--show]

Every second input is one of `CASES`: an index, header, name or configuration that contradicts another file. The others
are a good folder with one of its files damaged as in `readers.py`. A command is held if it ends well or with exit code
1 and one printable line of at most 300 characters, within 5 s of processor time and 600 MiB, and neither the folder
that it was given nor a canary beside it has changed (but for a run that goes on).

Everything happens in a temporary folder of its own, in forks of one process. Prints a table of tried and held; exit
code 1 if one was not held.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from readers import (
    FILE_KINDS,
    LONGEST,
    MEBIBYTES,
    SECONDS,
    damaged_bytes,
    damaged_header,
    fingerprint,
    other_file,
    run,
)

TESTS = Path(__file__).parents[2] / "tests"
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00003.safetensors"
QUERY = "model.layers.0.self_attn.q_proj.weight"
SMALL = ("layer=all", "family=both", "bank.m=2", "bank.r=5", "train.steps=2", "train.checkpoint_every=0")
READ = ("text=text.txt", "window=32", "stride=16", "max_tokens=64", "experts=2")
COUNTED = ("text=text.txt", "window=16", "tokens=64")
COMMANDS: dict[str, dict[str, list[str]]] = {
    "model": {
        "train": ["model.path=model", *SMALL, "hydra.run.dir=out"],
        "patch": ["run=run", "model.path=model", "out=out", "check=false"],
        "patch globe": ["run=run", "model.path=model", "out=out", "format=globe", "check=false"],
        "evaluate": ["model=model", "against=none", "out=out.json", *READ],
        "inspect": ["model"],
        "calibrate": ["model=model", "out=out", *COUNTED],
    },
    "run": {
        "patch": ["run=run", "out=out", "model.path=model", "check=false"],
        "evaluate": ["model=run", "against=model", "out=out.json", *READ],
        "inspect": ["run"],
        "report": ["run=run", "out=out", "details=0"],
        "train": ["model.path=model", *SMALL, "hydra.run.dir=run"],
    },
    "compact": {
        "evaluate": ["model=compact", "against=none", "out=out.json", *READ],
        "inspect": ["compact"],
        "train": ["model.path=compact", *SMALL, "hydra.run.dir=out"],
    },
    "cache": {"calibrate": ["model=model", "out=cache", *COUNTED]},
}
"""Folder that is damaged -> commands that read it."""
GOES_ON = {("run", "train"), ("cache", "calibrate")}
Change = Callable[[Path], object]


def of_json(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def edit(folder: Path) -> None:
        record = json.loads((folder / name).read_text())
        change(record)
        (folder / name).write_text(json.dumps(record))

    return edit


def of_map(**more: Any) -> Change:
    return of_json(INDEX, lambda record: record["weight_map"].update(more or {QUERY: "absent.safetensors"}))


def of_header(change: Callable[[dict[str, Any], str], object]) -> Change:
    """`change` gets the header of the first shard and the name of its first tensor."""

    def edit(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header, next(name for name in header if name != "__metadata__"))
        text = json.dumps(header).encode()
        (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return edit


def of_config(**more: Any) -> Change:
    return of_json("config.json", lambda record: record.update(more))


def shards_to(below: str) -> Change:
    return of_json(
        INDEX, lambda one: one.update(weight_map={k: below + v for k, v in one["weight_map"].items()})
    )


CASES: dict[str, Change] = {
    "index: an absent shard": of_map(),
    "index: a path upwards": of_map(**{QUERY: "../canary/precious"}),
    "index: an absolute path": of_map(**{QUERY: "/etc/hostname"}),
    "index: another case": shards_to("MODEL/"),
    "index: a folder": of_map(**{QUERY: "."}),
    "index: no text": of_map(**{QUERY: "\ud800"}),
    "index: control characters": of_map(**{QUERY: "a\x1b[2J\n\u202e"}),
    "index: a number": of_map(**{QUERY: 3}),
    "index: a tensor of no file": of_map(phantom=SHARD),
    "index: a list": of_json(INDEX, lambda one: one.update(weight_map=list(one["weight_map"]))),
    "index: no metadata": of_json(INDEX, lambda one: one.pop("metadata")),
    "index: too many names": lambda folder: (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {f"t{number}": SHARD for number in range(700_000)}})
    ),
    "files: no index": lambda folder: (folder / INDEX).unlink(),
    "files: one beside the index": lambda folder: shutil.copy(folder / SHARD, folder / "model.safetensors"),
    "files: a shard twice": lambda folder: (
        shutil.copy(folder / SHARD, folder / "again.safetensors"),
        of_map(phantom="again.safetensors")(folder),
    ),
    "files: pickled beside": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"\x80\x04evil"),
    "header: overlapping": of_header(lambda h, name: h[name].update(data_offsets=[0, 8])),
    "header: a hole": of_header(lambda h, name: h.pop(name)),
    "header: another dtype": of_header(lambda h, name: h[name].update(dtype="F64")),
    "header: a dtype of no name": of_header(lambda h, name: h[name].update(dtype="F\x1b[2J")),
    "header: a name of control characters": of_header(lambda h, name: h.update({"\x1b[2J\n": h.pop(name)})),
    "header: of another library": of_header(lambda h, name: h.update(__metadata__={"format": "tf"})),
    "header: transposed": of_header(lambda h, name: h[name].update(shape=h[name]["shape"][::-1])),
    "config: other counts": of_config(num_experts=7),
    "config: fewer layers": of_config(num_hidden_layers=1),
    "config: routing of -1": of_config(num_experts_per_tok=-1),
    "config: foreign code": of_config(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
    "config: a quantisation that is none": of_config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "config: a dense model": of_config(model_type="llama"),
    "config: a list for an activation": of_config(hidden_act=[[]], attn_implementation=[[]]),
    "config: a vocabulary of 10^12": of_config(vocab_size=10**12),
    "config: nested": lambda folder: (folder / "config.json").write_text(
        '{"model_type":"qwen3_moe","a":' + "[" * 10**5
    ),
}


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder; return which and how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    path = rng.choice(files)
    kind = rng.choice(("bytes", "bytes", "file"))
    if kind == "file":
        kind = rng.choice(
            [one for one in FILE_KINDS if one != "sparse"]
        )  # copied whole, for what is no weight
        other_file(path, kind)
    elif path.suffix == ".safetensors":
        path.write_bytes(damaged_header(path.read_bytes(), rng))
    else:
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
    return f"{path.relative_to(folder)} ({kind})"


def run_command(name: str, words: list[str], folder: Path) -> tuple[int, str, float, float]:
    """Run a command in a fork; return exit code, what it said, seconds and MiB."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for stream, file in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder.parent / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(folder)
            limit = int(SECONDS) * 3
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
            sys.argv = [f"globe.{name}", *words]
            mains()[name]()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.stdout.flush()
            os._exit(code)
    end = time.monotonic() + 300
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    said = (folder.parent / "stderr").read_bytes().decode("utf-8", "backslashreplace")
    seconds = usage.ru_utime + usage.ru_stime
    return os.waitstatus_to_exitcode(status), said, seconds, usage.ru_maxrss / 1024


def mains() -> dict[str, Callable[[], object]]:
    from globe import calibrate, evaluate, inspect, patch, report, train
    from globe.config.commands import start

    others = {
        "patch": patch,
        "evaluate": evaluate,
        "inspect": inspect,
        "report": report,
        "calibrate": calibrate,
    }
    return {"train": train.main} | {name: lambda one=one: start(one.main) for name, one in others.items()}  # type: ignore[misc]


def fault_of(code: int, said: str, seconds: float, mebibytes: float, *, drawn: bool) -> str:
    """Why a command was not held; empty if it was. Pictures may take their time."""
    lines = said.splitlines()
    if code not in (0, 1):
        return f"exit code {code}: {lines[-1:]}"
    if code == 1 and not lines:
        return "no sentence"
    if wrong := [line for line in lines if len(line) > LONGEST + 60 or not line.isprintable()]:
        return f"no printable line: {wrong[0][:200]!r}"
    if seconds > SECONDS and not drawn:
        return f"took {seconds:.1f} s"
    return f"took {mebibytes:.0f} MiB" if mebibytes > MEBIBYTES else ""


def make_folders(root: Path) -> None:
    """A checkpoint, its run, the compact checkpoint and a cache of statistics, as the commands make them."""
    sys.path[:0] = [str(TESTS), str(TESTS / "evaluation")]
    from evaluation_support import TEXT, write_tokenizer

    from tiny_models import write_tiny

    write_tiny("qwen3_moe", root / "model", vocab_size=257, max_shard_size="60KB")
    write_tokenizer(root / "model")
    (root / "text.txt").write_text(TEXT)
    (root / "canary").mkdir()
    (root / "canary" / "precious").write_text("precious")
    for name, words in (
        ("train", ["model.path=model", *SMALL, "hydra.run.dir=run"]),
        ("patch", ["run=run", "out=compact", "format=globe", "check=false"]),
        ("calibrate", ["model=model", "out=cache", *COUNTED]),
    ):
        code, said, *_ = run_command(name, words, root)
        assert code == 0, said


def torture(inputs: int, seed: int, only: str | None, *, show: bool) -> int:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    mains()
    tried, held, slowest, largest = Counter[str](), Counter[str](), 0.0, 0.0
    home = Path(tempfile.mkdtemp(prefix="globe-torture-"))
    try:
        (home / "good").mkdir()
        make_folders(home / "good")
        cases = [name for name in CASES if only in (None, name)]
        for number in range(inputs):
            rng, work = random.Random(f"{seed}/{number}"), home / "work"
            shutil.copytree(home / "good", work)
            chosen = number % 2 == 0 or only is not None
            kind = "model" if chosen else rng.choice(list(COMMANDS))
            what = cases[number // (1 if only else 2) % len(cases)] if chosen else ""
            what = what or damage(work / kind, rng)
            if chosen:
                CASES[what](work / "model")
            name, words = rng.choice(list(COMMANDS[kind].items()))
            kept = [work / one for one in ("canary", "model", "run", "compact", "cache")]
            kept = [one for one in kept if not ((kind, name) in GOES_ON and one.name == kind)]
            before = [fingerprint(one) for one in kept]
            code, said, seconds, mebibytes = run_command(name.split()[0], words, work)
            fault = fault_of(code, said, seconds, mebibytes, drawn=name == "report")
            fault = fault or "" if before == [fingerprint(one) for one in kept] else "a folder was changed"
            row = name if not chosen else f"{name}, contradiction"
            tried[row] += 1
            held[row] += not fault
            slowest = max(slowest, seconds if name != "report" else 0.0)
            largest = max(largest, mebibytes)
            if fault or show:
                print(f"{number} {kind}: {what}: {name}: {fault or said.strip() or 'done'}")
            shutil.rmtree(work)
    finally:
        shutil.rmtree(home)
    print("| command | tried | held |\n|---|---|---|")
    for row, count in sorted(tried.items()):
        print(f"| {row} | {count} | {held[row]} |")
    print(f"| all | {tried.total()} | {held.total()} |\n\nslowest {slowest:.1f} s, largest {largest:.0f} MiB")
    return int(held.total() < tried.total())


if __name__ == "__main__":
    sys.exit(run(torture, __doc__, 300, "cases"))
