"""Examples of Hypothesis for the readers of foreign files, until so much processor time is used.

    python experiments/torture/fuzz.py [--minutes 10] [--seed 0]

Each example is a good file in which Hypothesis has put other values at other places, other bytes, or another length of
the header; it shrinks what is not held to the smallest such file. Held: the reader returns, or refuses by an error of
one printable line. Everything runs in this process, below a limit of memory (RLIMIT_AS), in a temporary folder.
The minutes are those of this process's processor time, whatever else the machine does.
Prints examples by reader; exit code 1 with the example at the first finding.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from readers import KEYS, LONGEST, MEBIBYTES, PLAIN_VALUES, Reader, make_sources, nodes
from sources import more_sources

LEFT_OUT = ("config.json, format=globe", "config.json, evaluated")
"""Other readers of files that are read by one here."""
AT_ONCE = 50
"""Examples of one reader before the next one has its turn."""
SLOWEST = 5.0

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([one for one in PLAIN_VALUES if not isinstance(one, str) or len(one) < 100])
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=12) | st.sampled_from(KEYS[:1]), inner, max_size=5)
    ),
    max_leaves=12,
)


@st.composite
def records(draw: st.DrawFn, record: Any) -> bytes:
    """A good record with one to four places changed, as the bytes of a file; now and then with bytes changed too."""
    record = json.loads(json.dumps(record))
    for _ in range(draw(st.integers(1, 4))):
        places = nodes(record)[1:]
        if not places:
            break
        *above, last = draw(st.sampled_from(places))
        parent = record
        for key in above:
            parent = parent[key]
        if draw(st.booleans()):
            parent[last] = copy.deepcopy(draw(values))  # other changes may come to lie in it
        elif isinstance(parent, dict) and draw(st.booleans()):
            parent[draw(st.text(max_size=12))] = parent.pop(last)
        else:
            del parent[last]
    content = json.dumps(record).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=8)) + content[at + draw(st.integers(0, 8)) :]
    return content


@st.composite
def headers(draw: st.DrawFn, file: bytes) -> bytes:
    """A safetensors file with another header, and now and then with another length of it or other data."""
    (length,) = struct.unpack("<Q", file[:8])
    header = draw(records(json.loads(file[8 : 8 + length])))
    said = draw(st.just(len(header)) | st.just(len(header)) | st.integers(0, 2**64 - 1))
    data = file[8 + length :]
    return struct.pack("<Q", said) + header + data[: draw(st.just(len(data)) | st.integers(0, len(data)))]


def examples_of(reader: Reader) -> st.SearchStrategy[bytes]:
    file = reader.source / reader.file
    if file.suffix == ".safetensors":
        return headers(file.read_bytes())
    if file.suffix == ".jsonl":
        whole = [json.loads(line) for line in file.read_text().splitlines()]
        return st.lists(st.sampled_from(whole).flatmap(records), max_size=4).map(b"\n".join)
    if file.suffix == ".yaml":
        return records({"bank": {"m": 3, "r": [7]}, "layer": "4-9"})  # JSON is YAML
    return records(json.loads(file.read_bytes()))


def require_held(read: Callable[[Path], object], folder: Path) -> None:
    from globe.errors import GlobeError

    started = time.process_time()
    try:
        read(folder)
    except GlobeError as error:
        said = str(error)
        assert said.isprintable(), said
        assert 0 < len(said) <= LONGEST, said
    assert time.process_time() - started < SLOWEST


def fuzz_one(reader: Reader, folder: Path, number: int) -> int:
    """Try examples of one reader; returns how many. Raises what the smallest example that is not held raises."""
    tried = 0

    @seed(number)
    @settings(
        max_examples=AT_ONCE,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(examples_of(reader))
    def trial(content: bytes) -> None:
        nonlocal tried
        tried += 1
        (folder / reader.file).write_bytes(content)
        require_held(reader.read, folder)

    trial()
    return tried


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the names of readers")
    options = parser.parse_args()
    import logging

    import torch
    import transformers

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tried, used = Counter[str](), defaultdict[str, float](float)
    with tempfile.TemporaryDirectory(prefix="globe-fuzz-") as name:
        root = Path(name)
        sources = make_sources(root / "sources")
        sources |= more_sources(root / "sources", sources)
        fuzzed = [kind for kind in sources if kind not in LEFT_OUT and options.only in kind]
        folders = {}
        for kind in fuzzed:
            folders[kind] = root / kind.replace("/", " ")
            shutil.copytree(sources[kind].source, folders[kind], ignore=shutil.ignore_patterns("banks"))
            sources[kind].read(folders[kind])  # imports what the reader needs
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + (MEBIBYTES << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        end, number = time.process_time() + 60 * options.minutes, options.seed
        while time.process_time() < end:
            kind = fuzzed[number % len(fuzzed)]
            began = time.process_time()
            try:
                tried[kind] += fuzz_one(sources[kind], folders[kind], number)
            except BaseException:
                print(
                    f"{kind}, seed {number}, is not held: {(folders[kind] / sources[kind].file).read_bytes()[:2000]!r}"
                )
                raise
            used[kind] += time.process_time() - began
            number += 1
    for kind, count in tried.items():
        print(f"{kind:26} {count:8} {used[kind]:8.1f} s")
    print(
        f"{sum(tried.values())} examples in {sum(used.values()) / 60:.1f} minutes of processor time, no finding"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
