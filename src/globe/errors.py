"""The errors a user can cause. Each message is one sentence that names the option or file and the remedy."""


class GlobeError(ValueError):
    """Base of every error that a wrong option, file or checkpoint can cause."""


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
