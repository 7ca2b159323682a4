"""What every `python -m globe.NAME` shares: start Hydra, and turn an error of the user's into one sentence.

Exit codes: 0 done, 1 an error, 130 stopped with Ctrl-C. What is not the user's doing keeps its traceback.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import CompactHydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from globe.config.launchers import EXTRAS
from globe.errors import GlobeError, sentence

INTERRUPTED = 130
_KILLED = ("TerminatedWorkerError", "BrokenProcessPool")
_DISK = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EEXIST,
)


def say(sentence: str) -> None:
    """One line to the person at the terminal."""
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


def start(main: Callable[[], Any], *, say: Callable[[str], None] = say) -> None:
    """Run a `hydra.main` function as a program. Leaves with SystemExit unless all went well.

    `say` gets the sentence of what ended it otherwise.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra prints several lines per error and exits by itself; with this set it hands the error to us
    os.environ["HYDRA_FULL_ERROR"] = "1"
    logging.raiseExceptions = False  # a log that can't be written (disk full) must not print tracebacks
    try:
        main()
    except KeyboardInterrupt as stop:
        say(f"interrupted: {stop or 'the same command goes on from here'}")
        sys.exit(INTERRUPTED)
    except Exception as error:
        sentence = explain(error)
        if sentence is None or wants_traceback:
            raise
        say(sentence)
        sys.exit(1)
    finally:
        if not wants_traceback:
            del os.environ["HYDRA_FULL_ERROR"]


def explain(error: BaseException) -> str | None:
    """One sentence for an error that a user can cause; None for every other."""
    match error:
        case GlobeError():
            return _one_line(str(error))
        case OverrideParseException():
            return f"{error.override!r} is not understood: give key=value, with quotes around what is special"
        case CompactHydraException():
            return _of_hydra(error)
        case OmegaConfBaseException():
            return _of_omegaconf(error, None)
        case OSError():
            return _of_disk(error)
        case RuntimeError() if missing := re.match(
            r"Unknown plugin class : 'hydra_plugins\.(\w+\.\w+)", str(error)
        ):
            extra = EXTRAS.get(missing[1])
            return None if extra is None else _of_plugin(f"the launcher or sweeper {extra}", extra)
        case RuntimeError() if type(error).__name__ in _KILLED:
            return (
                "a worker process was killed, most likely for want of memory: give a smaller hydra.launcher.n_jobs, "
                "the same command goes on from here"
            )
        case ValueError() if _raised_in_hydra(error):  # its checks of the command line
            if "Config group override" in str(error):
                return "a group (method, model, init, schedule, wandb, experiment) takes the name of one of its files"
            return _one_line(str(error))
    return None


def is_disk_full(error: BaseException) -> bool:
    """Is a full disk the reason, at first or at second hand?"""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DISK:
            return True
        if "os error 28" in str(cause) or "No space left" in str(cause):  # as safetensors says it
            return True
        cause = cause.__cause__
    return False


def _of_hydra(error: CompactHydraException) -> str:
    cause = error.__cause__
    if isinstance(cause, GlobeError):
        return _one_line(str(cause))
    if isinstance(cause, OmegaConfBaseException):
        return _of_omegaconf(cause, str(error))
    text = str(error)
    if missing := re.search(r"Could not find '(hydra/(?:launcher|sweeper)/[^']+)'", text):
        group, option = re.split(r"/(?=sampler|[^/]+$)", missing[1], maxsplit=1)
        option = "optuna" if option.startswith("sampler") else option
        if (extra := option.partition("_")[0]) in EXTRAS.values():
            return _of_plugin(f"{group}={option}", extra)
    if missing := re.search(r"Could not find '([^']+)'", text):
        listed = re.search(r"Available options in '[^']*':\n((?:\t.*\n?)+)", text)
        names = [name for name in listed[1].split() if not name.endswith("_schema")] if listed else []
        group, _, option = missing[1].rpartition("/")
        known = f"give one of {', '.join(names)}" if names else "correct the name, see the folder conf/"
        return f"{group}={option} is not possible: {known}"
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, _, value = ambiguous[1].partition("=")
        return f"{ambiguous[1]!r} is ambiguous: give {key}=[{value}] for a list, or -m for a sweep"
    return _one_line(text)


def _of_plugin(what: str, extra: str) -> str:
    return f"{what} needs a plugin that is not installed: pip install 'globe-moe[{extra}]'"


def _of_omegaconf(error: OmegaConfBaseException, context: str | None) -> str:
    """The key, the value and what is allowed, from OmegaConf's four lines."""
    key = error.full_key or ""
    reason = str(error.msg or error).split("\n")[0].rstrip(".")
    if re.match(r"Key '.+' not in '", reason):
        options = [one.name for one in fields(error.object_type)] if is_dataclass(error.object_type) else []
        listed = f": give one of {', '.join(options)}" if options else ""
        return f"{key} is not an option{listed}"
    override = re.match(r"Error merging override (.+)", context or "")
    what = override[1] if override else key
    for pattern, remedy in _REMEDIES:
        if match := re.search(pattern, reason):
            return f"{what} is not possible: {match.expand(remedy).replace('KEY', key)}"
    return f"{what} is not possible: {_one_line(reason)}" if what else _one_line(reason)


_REMEDIES = (
    (r"could not be converted to Integer", "give an integer"),
    (r"could not be converted to Float", "give a number"),
    (r"is not a valid bool|could not be converted to Boolean", "give true or false"),
    (r"expected one of \[(.+)\]", r"give one of \1"),
    (r"type hint '(?:Optional\[)?Union\[int, str", "give an integer or an expression such as n/4 or p/2"),
    (r"is not Optional", "it needs a value"),
    (r"is not a subclass of \w+Config", "it is a group, give its options, such as KEY.option=value"),
    (r"is not a ListConfig", "give a list, such as KEY=[a,b]"),
    (r"does not support deletion", "an option can be changed and not removed"),
)
"""What OmegaConf says, and what to do about it."""


def _of_disk(error: OSError) -> str | None:
    where = f" {error.filename}" if error.filename else ""
    if is_disk_full(error):
        return f"the disk is full, writing{where} failed: make room, the same command goes on from here"
    # a missing file is a mistake of ours, unless it is the parent of a run folder that Hydra wants to make
    refused = error.errno in _REFUSED or (error.errno == errno.ENOENT and _raised_in_hydra(error))
    if refused and error.filename:
        return f"{error.filename} can't be used ({error.strerror}): give another output folder"
    return None


def _raised_in_hydra(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    modules = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    own = [module for module in modules if module not in ("pathlib", "os", "shutil")]
    return bool(own) and own[-1].startswith("hydra.")


def _one_line(text: str) -> str:
    return " ".join(sentence(text).split())
