"""Count the rooms that one record passes through, from the imports of a source tree.

    python experiments/docs/walk.py                        # the working tree
    python experiments/docs/walk.py --revision e386a8d     # the tree of an earlier commit

A room is a folder of `src/globe/`, or a module that lies directly in it. A record passes through a module that names it
in an import, and through the module that defines it.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDS = {"Config": "the configuration of a run", "BankPlan": "the plan of one bank"}


def working_tree() -> Iterator[tuple[str, str]]:
    """Yield the path below `src/globe` and the text of every module."""
    source = ROOT / "src" / "globe"
    for path in sorted(source.rglob("*.py")):
        yield path.relative_to(source).as_posix(), path.read_text()


def tree_of(revision: str) -> Iterator[tuple[str, str]]:
    """Yield the same from a commit."""
    packed = subprocess.run(
        ["git", "archive", revision, "src/globe"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive.getmembers():
            if member.name.endswith(".py") and (file := archive.extractfile(member)):
                yield member.name.removeprefix("src/globe/"), file.read().decode()


def names(text: str, record: str) -> bool:
    """Return whether a module imports or defines the record."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == record:
            return True
        imported = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("globe")
        if imported and record in {alias.name for alias in node.names}:
            return True
    return False


def room(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--revision", help="commit to read instead of the working tree")
    revision = parser.parse_args().revision
    files = list(tree_of(revision) if revision else working_tree())
    at_top = {path for path, _ in files if "/" not in path}
    print(
        f"{len(files)} modules, {len(at_top)} of them at the top, {len({room(path) for path, _ in files})} rooms"
    )
    for record, meaning in RECORDS.items():
        passed = [path for path, text in files if names(text, record)]
        rooms = sorted({room(path) for path in passed})
        print(f"{meaning} ({record}): {len(passed)} modules in {len(rooms)} rooms: {', '.join(rooms)}")


if __name__ == "__main__":
    main()
