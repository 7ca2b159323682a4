"""The errors a user can cause. Each message is one printable sentence that names the option or file and the remedy."""

from __future__ import annotations

import re

LONGEST = 300
"""Characters of the longest sentence; a longer one loses its middle, so that the remedy at its end stays."""
_TAIL = 120


def printable(text: str) -> str:
    """Return `text` as one line without control characters, at most `LONGEST` characters long.

    Names out of foreign files stand in sentences, and could move the cursor of a terminal. What Unicode does not
    call printable is written as an escape, such as `\\x1b`; line breaks become spaces.
    """
    # an escape makes up to ten characters of one, so that the middle of a huge text need not be looked at
    if len(text) > 4 * LONGEST:
        text = text[: 2 * LONGEST] + text[-2 * LONGEST :]
    line = re.sub(r"\s*[\r\n]+\s*", " ", text.strip())
    line = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST - _TAIL - 5]} ... {line[-_TAIL:]}"


class GlobeError(ValueError):
    """Base of every error that a wrong option, file or checkpoint can cause. Its message is made `printable`."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(GlobeError):
    """A configuration value is out of range, contradictory or unknown."""


class CheckpointError(GlobeError):
    """A model checkpoint is missing, incomplete, of an unknown kind, or holds unusable numbers."""


class ArtefactError(GlobeError):
    """A GloBE artefact is missing, truncated, foreign, or of another format version."""


class SweepError(GlobeError):
    """Runs of a sweep failed; the others are done."""


class FitError(GlobeError):
    """A fit cannot go on: its numbers are no longer finite, or a solve failed beyond repair."""


def printable(text: str) -> str:
    """Return a text as one line that a terminal shows and does not obey: an escape character becomes `\\x1b`."""
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    if character.isspace():
        return " "
    return character.encode("unicode_escape").decode("ascii")
