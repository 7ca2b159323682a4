"""Cut the calibration text that comes with the package out of a longer one.

    python experiments/train_moe/calibration.py calibration.txt out.txt --without heldout.txt more.txt

Takes `--pieces` pieces of `--characters` characters, evenly spaced, each moved forward to the next blank line, and
leaves out every paragraph that shares 60 characters in a row with a text of `--without`, whatever the white space.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

RUN = 60
"""Characters in a row that two texts may not share."""


def squeezed(text: str) -> str:
    return "".join(text.lower().split())


def shared(paragraph: str, runs: set[str]) -> bool:
    text = squeezed(paragraph)
    return any(text[start : start + RUN] in runs for start in range(max(1, len(text) - RUN + 1)))


def cut(text: str, *, pieces: int, characters: int, without: list[str]) -> str:
    """The pieces joined by blank lines."""
    runs = set()
    for other in map(squeezed, without):
        runs |= {other[start : start + RUN] for start in range(len(other) - RUN + 1)}
    found = []
    for number in range(pieces):
        start = number * (len(text) - 2 * characters) // max(1, pieces - 1)
        start = max(text.find("\n\n", start), 0)
        paragraphs = re.split(r"\n\n+", text[start : start + characters])
        found += [one.strip("\n") for one in paragraphs if one.strip() and not shared(one, runs)]
    return "\n\n".join(found) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--without", type=Path, nargs="*", default=[])
    parser.add_argument("--pieces", type=int, default=40)
    parser.add_argument("--characters", type=int, default=1600)
    options = parser.parse_args()
    without = [one.read_text(encoding="utf-8") for one in options.without]
    text = options.text.read_text(encoding="utf-8")
    result = cut(text, pieces=options.pieces, characters=options.characters, without=without)
    options.out.write_text(result, encoding="utf-8")


if __name__ == "__main__":
    main()
