"""Hostile bytes for every reader of foreign files: each ends in one printable sentence, soon and in little memory.

    python experiments/torture/readers.py [--inputs 1200] [--seed 0] [--only READER] [--show]

A good file of each kind is damaged in a seeded way and read in a forked process of its own, under limits of the system
(RLIMIT_CPU, RLIMIT_AS). An input is held if the reader returns, or raises a GlobeError of one printable line of at most
300 characters, within 5 s of processor time and 600 MiB, and neither a canary folder nor anything else beside the input
has changed. Prints a table of tried and held; the exit code is 1 if one was not held.

Safe as root: everything, pipes and device nodes included, is made in a temporary folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SECONDS, MEBIBYTES, LONGEST = 5.0, 600, 300
GUARD = 15
"""Seconds of processor time after which the system ends a reader, and of wall clock after which we do."""
PLAIN_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 20.9, 1e300, 2**31, 2**63, 10**30, -(10**12), 10**12, "", "\x1b[2J\x07", "a\nb\tc", "\u202e",
    "\ud800", "٣", "../../up", "/", "x" * 10**6, "\0", "${oc.env:HOME}", "[bold]red[/bold]", "=1+1", "NaN", "1e999", [],
    {}, [[]], [20.9, 24.9], ["F32"], {"a": {"b": []}}, [0] * 1000,
)  # fmt: skip
RAW_VALUES = (
    "1e999", "-1e999", "NaN", "Infinity", "9" * 5000, "[" * 70 + "]" * 70, "[" * 10**5, '{"a":' * 10**4, "01", "'", "",
)  # fmt: skip
"""What json.dumps would not write."""
KEYS = ("\x1b[31m", "a" * 10**5, "extra", "__metadata__", "__proto__", "9" * 5000)
OFFSETS = ([0, 2**62], [8, 4], [-8, 8], [0, 0], [2**64, 2**64 + 8], [1, 9])
SHAPES = ([2**62, 4, 0], [0] * 10**5, [2**40, 2**40], [1] * 60, [20.9, 24.9], [True], [-1, -1])
FILE_KINDS = ("empty", "missing", "folder", "pipe", "device", "dangling", "loop", "sparse", "lfs", "zeros")


# damage


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in plain JSON."""
    found = [path]
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        found += nodes(child, (*path, key))
    return found


def damaged_json(record: Any, rng: random.Random) -> bytes:
    """The record with one or two of its values, keys or bytes changed."""
    record, raw = json.loads(json.dumps(record)), []
    for _ in range(rng.choice((1, 1, 1, 2))):
        *above, last = rng.choice(nodes(record)[1:])
        parent = record
        for key in above:
            parent = parent[key]
        match rng.choice(("plain", "plain", "raw", "remove", "add", "rename")):
            case "plain":
                parent[last] = rng.choice(PLAIN_VALUES)
            case "raw":
                raw.append(rng.choice(RAW_VALUES))
                parent[last] = f"@{len(raw) - 1}@"
            case "remove":
                del parent[last]
            case "add" if isinstance(parent, dict):
                parent[rng.choice(KEYS)] = rng.choice(PLAIN_VALUES)
            case "rename" if isinstance(parent, dict):
                parent[str(last).replace("0", "9" * rng.choice((1, 6, 5000)))] = parent.pop(last)
            case _:
                parent[last] = [parent[last]]
    text = json.dumps(record)
    for number, one in enumerate(raw):
        text = text.replace(f'"@{number}@"', one)
    return text.encode("utf-8", "surrogatepass")


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """The bytes cut, flipped, doubled, or in another encoding."""
    at = rng.randrange(len(content) + 1)
    match rng.choice(("cut", "flip", "insert", "mark", "utf-16", "doubled", "tail", "nested", "many")):
        case "cut":
            return content[:at]
        case "flip":
            changed = bytearray(content)
            for _ in range(rng.choice((1, 3, 30))):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case "insert":
            return content[:at] + rng.randbytes(rng.choice((1, 8, 1000))) + content[at:]
        case "mark":
            return b"\xef\xbb\xbf" + content
        case "utf-16":
            return content.decode("latin-1").encode("utf-16")
        case "doubled":
            return content + content
        case "tail":
            return content + b"\0" * rng.choice((1, 7, 10**6))
        case "nested":
            return (b"[" if rng.random() < 0.5 else b'{"a":') * 10 ** rng.choice((3, 5))
        case _:
            return b'{"a":' + b"[[]" + b",[]" * 10**6 + b"]}"


def damaged_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or another length of it."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    match rng.choice(
        ("value", "value", "value", "value", "length", "bytes", "overlap", "empty tensors", "shape")
    ):
        case "value":
            text = damaged_json(header, rng)
        case "length":
            wrong = rng.choice((0, 1, length - 1, length + 1, 10**8, 10**8 + 1, 2**40, 2**63, 2**64 - 1))
            return struct.pack("<Q", wrong) + content[8:]
        case "overlap":
            name = rng.choice([one for one in header if one != "__metadata__"])
            header[name]["data_offsets"] = rng.choice(OFFSETS)
            text = json.dumps(header).encode()
        case "shape":
            name = rng.choice([one for one in header if one != "__metadata__"])
            header[name]["shape"] = rng.choice(SHAPES)
            text = json.dumps(header).encode()
        case "empty tensors":
            entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
            text = ("{" + ",".join(entry.format(k) for k in range(rng.choice((10**3, 10**6)))) + "}").encode()
            data = b""
        case _:
            text = damaged_bytes(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(text)) + text + data


def other_file(path: Path, kind: str) -> None:
    """Put something that is no good file in the place of one."""
    path.unlink()
    match kind:
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            try:
                os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # zeros without end, a node of our own
            except PermissionError:
                os.mkfifo(path)
        case "dangling":
            path.symlink_to("absent")
        case "loop":
            path.symlink_to(path.name)
        case "sparse":
            with path.open("wb") as file:
                file.truncate(1 << 40)
        case "lfs":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
        case "zeros":
            path.write_bytes(bytes(10**7))


# readers


@dataclass(frozen=True)
class Reader:
    """A good folder, the file in it that is damaged, and what reads it."""

    source: Path
    file: str
    read: Callable[[Path], object]


def checkpoint_of(folder: Path) -> object:
    from globe.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(folder))
    checkpoint.total_parameters  # noqa: B018
    for layer in checkpoint.moe_layers:
        for family in checkpoint.families(layer):
            checkpoint.read_experts(layer, family, max_experts=2)
    return checkpoint


def skeleton_of(folder: Path) -> object:
    from globe.checkpoint import open_checkpoint
    from globe.hf.globe_checkpoint import build_skeleton

    return build_skeleton(open_checkpoint(str(folder)))


def model_of(folder: Path) -> object:
    from globe.hf.loading import load

    return load(folder)


def bank_of(folder: Path) -> object:
    from globe.bank.compose import rebuild
    from globe.bank.file import read_artefact

    return rebuild(read_artefact(folder, verify_hash=False), [0])


def run_of(folder: Path) -> object:
    from globe.runs.folder import RunFolder
    from globe.runs.summary import read_summary

    run = RunFolder(folder)
    return run.status, read_summary(run.summary_file)


def options_of(folder: Path) -> object:
    from globe.config.plain_yaml import read_yaml

    try:
        return read_yaml(folder / "config.yaml")
    except (OSError, ValueError) as error:  # whose reason stands in a sentence of its callers
        return str(error)


def patched_of(folder: Path) -> object:
    from globe.hf.destination import check_destination

    return check_destination(folder, overwrite=True)


def make_sources(folder: Path) -> dict[str, Reader]:
    """Good files: a small checkpoint, one of several shards, a bank, a compact checkpoint, a run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from globe.bank.file import BankArtefact, Member, write_artefact
    from globe.checkpoint import open_checkpoint
    from globe.hf.globe_checkpoint import write_globe
    from globe.hf.run_banks import open_run
    from globe.runs.folder import BankStatus, RunFolder, State

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 37, "hidden_size": 24, "intermediate_size": 44, "moe_intermediate_size": 20, "num_experts": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3,
        "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes))
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    checkpoint = open_checkpoint(str(folder / "one"))
    names = {checkpoint.locate(1, "up", expert).tensor for expert in range(4)}
    bank = BankArtefact(
        members=(Member(1, "up", 0, 4, (0, 1, 2, 3)),),
        codes=torch.rand(4, 3),
        adapters=torch.randn(4, 20, 7),
        bank=torch.randn(3, 7, 24),
        activation="silu",
        lam=0.5,
        source={**checkpoint.source(), "sha256": checkpoint.hash_tensors(names)},
    )
    write_artefact(bank, folder / "run" / "banks" / "layer001.up")
    write_globe(open_run(folder / "run"), checkpoint, folder / "compact")
    run = RunFolder(folder / "state")
    run.begin({"seed": 0})
    run.report("layer001.up", BankStatus(State.finished))
    run.end(State.finished)
    run.write_summary(
        {"format_version": 1, "name": "a", "banks": [], "source": {}, "failed": {}, "metrics": {}}
    )
    bank_folder, index = folder / "run" / "banks" / "layer001.up", "model.safetensors.index.json"
    return {
        "header": Reader(folder / "one", "model.safetensors", checkpoint_of),
        "index": Reader(folder / "shards", index, checkpoint_of),
        "config.json": Reader(folder / "one", "config.json", checkpoint_of),
        "config.json, format=globe": Reader(folder / "one", "config.json", skeleton_of),
        "config.json, evaluated": Reader(folder / "one", "config.json", model_of),
        "globe.json": Reader(bank_folder, "globe.json", bank_of),
        "bank.safetensors": Reader(bank_folder, "bank.safetensors", bank_of),
        "compact config.json": Reader(folder / "compact", "config.json", model_of),
        "compact header": Reader(folder / "compact", "model.safetensors", model_of),
        "status.json": Reader(folder / "state", "status.json", run_of),
        "summary.json": Reader(folder / "state", "summary.json", run_of),
        "config.yaml": Reader(folder / "state", "config.yaml", options_of),
        "globe_patch.json": Reader(folder / "compact", "globe_patch.json", patched_of),
    }


def make_input(reader: Reader, folder: Path, rng: random.Random) -> str:
    """A copy of the reader's folder with its file damaged; returns the kind of damage."""
    shutil.copytree(reader.source, folder, ignore=shutil.ignore_patterns("banks"))
    path = folder / reader.file
    kind = rng.choice(("structure",) * 6 + ("bytes",) * 3 + ("file",))
    if kind == "file":
        other_file(path, rng.choice(FILE_KINDS))
        return kind
    content = path.read_bytes()
    if kind == "bytes":
        path.write_bytes(damaged_bytes(content, rng))
    elif path.suffix == ".safetensors":
        path.write_bytes(damaged_header(content, rng))
    elif path.suffix == ".jsonl":
        whole = json.loads(content.splitlines()[-1])
        path.write_bytes(content + damaged_json(whole, rng) + b"\n")
    elif path.suffix == ".yaml":
        path.write_bytes(damaged_json({"bank": {"m": 3, "r": [7]}, "layer": "4-9"}, rng))  # JSON is YAML
    else:
        path.write_bytes(damaged_json(json.loads(content), rng))
    return kind


# trial


@dataclass(frozen=True)
class Outcome:
    sentence: str
    """of the refusal; empty where the reader returned"""
    fault: str
    """why the input was not held; empty where it was"""
    seconds: float
    mebibytes: float


def trial(read: Callable[[Path], object], folder: Path) -> Outcome:
    """Read in a forked process under limits."""
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receiving)
        os.write(sending, pickle.dumps(_read(read, folder))[:60_000])
        os._exit(0)
    os.close(sending)
    end, answer = time.monotonic() + 4 * GUARD, b""
    os.set_blocking(receiving, False)
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    try:
        answer = os.read(receiving, 1 << 20)
    except BlockingIOError:
        answer = b""
    finally:
        os.close(receiving)
    seconds, mebibytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    sentence, fault = pickle.loads(answer) if answer else ("", f"ended with status {status}")
    if not fault and seconds > SECONDS:
        fault = f"took {seconds:.1f} s"
    if not fault and mebibytes > MEBIBYTES:
        fault = f"took {mebibytes:.0f} MiB"
    return Outcome(sentence, fault, seconds, mebibytes)


def _read(read: Callable[[Path], object], folder: Path) -> tuple[str, str]:
    from globe.errors import GlobeError

    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + (MEBIBYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (GUARD, GUARD))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        read(folder)
    except GlobeError as error:
        said = str(error)
        good = said.isprintable() and 0 < len(said) <= LONGEST
        return said, "" if good else f"no sentence of one line: {said[:200]!r}"
    except BaseException as error:
        return "", f"{type(error).__name__}: {str(error)[:200]}"
    return "", ""


def fingerprint(folder: Path) -> str:
    """Names, kinds and contents below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)} {path.lstat().st_mode}".encode())
        if path.is_file() and not path.is_symlink():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def torture(inputs: int, seed: int, only: str | None, *, show: bool) -> int:
    import torch
    import transformers

    import globe  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root = Path(tempfile.mkdtemp(prefix="globe-torture-"))
    outcomes: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    try:
        from sources import more_sources

        sources = make_sources(root / "sources")
        sources |= more_sources(root / "sources", sources)
        readers = {k: one for k, one in sources.items() if only in (None, k)}
        for reader in readers.values():
            good = trial(reader.read, reader.source)  # also imports what later trials share
            assert not good.fault, good.fault
        canary = root / "work" / "canary"
        canary.mkdir(parents=True)
        (canary / "precious").write_text("precious")
        before = fingerprint(canary), fingerprint(root / "sources")
        for number in range(inputs):
            name = list(readers)[number % len(readers)]
            folder = root / "work" / "input"
            kind = make_input(readers[name], folder, random.Random(f"{seed}/{name}/{number}"))
            outcome = trial(readers[name].read, folder)
            if (beside := sorted(os.listdir(root / "work"))) != ["canary", "input"]:
                outcome = replace(outcome, fault=f"there is {beside} beside the input")
            outcomes[name, kind].append(outcome)
            if outcome.fault or show:
                print(f"{number} {name} ({kind}): {outcome.fault or outcome.sentence or 'read'}")
            shutil.rmtree(folder)
        untouched = (fingerprint(canary), fingerprint(root / "sources")) == before
    finally:
        shutil.rmtree(root)
    print(
        f"\n{'reader':26} {'damage':10} {'tried':>6} {'held':>6} {'refused':>8} {'most s':>7} {'most MiB':>9}"
    )
    for (name, kind), listed in sorted(outcomes.items()):
        held = [one for one in listed if not one.fault]
        print(
            f"{name:26} {kind:10} {len(listed):6} {len(held):6} {sum(bool(one.sentence) for one in held):8} "
            f"{max(one.seconds for one in listed):7.2f} {max(one.mebibytes for one in listed):9.0f}"
        )
    everything = [one for listed in outcomes.values() for one in listed]
    failed = sum(bool(one.fault) for one in everything)
    print(
        f"{len(everything)} tried, {len(everything) - failed} held; canary {'untouched' if untouched else 'CHANGED'}"
    )
    return int(failed > 0 or not untouched)


def run(torture: Callable[..., int], usage: str | None, inputs: int, things: str) -> int:
    """Parse the command line of a torture and run it."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=inputs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=f"name of one of the {things}")
    parser.add_argument("--show", action="store_true", help="print every outcome")
    options = parser.parse_args()
    return torture(options.inputs, options.seed, options.only, show=options.show)


if __name__ == "__main__":
    sys.exit(run(torture, __doc__, 1200, "readers"))
