"""The errors a user can cause. Each message is one printable sentence that names the option or file and the remedy."""

from __future__ import annotations

import re

LONGEST = 300
"""Characters of the longest sentence; a longer one loses its middle, so that the remedy at its end stays."""
_TAIL = 120


def printable(text: str) -> str:
    """Return a text as one line that a terminal shows and does not obey: an escape character becomes `\\x1b`."""
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    if character.isspace():
        return " "
    return character.encode("unicode_escape").decode("ascii")


def sentence(text: str) -> str:
    """Return `text` as one printable line of at most `LONGEST` characters; line breaks become spaces.

    Names out of foreign files stand in sentences, and may be long or move the cursor of a terminal.
    """
    # an escape makes up to ten characters of one, so that the middle of a huge text need not be looked at
    if len(text) > 4 * LONGEST:
        text = text[: 2 * LONGEST] + text[-2 * LONGEST :]
    line = printable(re.sub(r"\s*[\r\n]+\s*", " ", text.strip()))
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST - _TAIL - 5]} ... {line[-_TAIL:]}"


class GlobeError(ValueError):
    """Base of every error that a wrong option, file or checkpoint can cause. Its message is made a `sentence`."""

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


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
