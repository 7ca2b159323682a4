"""What every `python -m globe.NAME` shares: start Hydra, and turn an error of the user's into one sentence.

Exit codes: 0 done, 1 an error, 130 stopped with Ctrl-C. What is not the user's doing keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any

import yaml
from hydra.errors import CompactHydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from globe.config.launchers import EXTRAS
from globe.errors import GlobeError, sentence

INTERRUPTED = 130
_SIGNALS = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU")
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
    errno.ELOOP,
    errno.ENXIO,
)
_BROKEN = {
    errno.EFBIG: "it would be larger than a file may be here: raise the limit (ulimit -f) or give another folder",
    errno.EIO: "the disk reports an error: check it, or give another folder",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close some",
    errno.ENOMEM: "memory ran out: close other programs, or lower model.max_experts, bank.m or bank.r",
    errno.ESTALE: "the network drive has lost it: check the connection",
    errno.ETIMEDOUT: "the network drive does not answer: check the connection",
}
"""What to say of an error that is neither a full disk nor a refusal; the same command goes on from there."""
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|bad_alloc", re.IGNORECASE)


def say(sentence: str) -> None:
    """Print one line for the person at the terminal."""
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
    _unwind_at_signals()
    try:
        main()
    except StoppedBySignal as stop:
        say(f"stopped by {stop.name}: {stop}")
        sys.exit(128 + stop.number)
    except KeyboardInterrupt as stop:
        say(f"interrupted: {str(stop) or 'the same command goes on from here'}")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except Exception as error:
        sentence = explain(error)
        if sentence is None or wants_traceback:
            raise
        say(sentence)
        sys.exit(1)
    finally:
        if not wants_traceback:
            del os.environ["HYDRA_FULL_ERROR"]


class StoppedBySignal(KeyboardInterrupt):
    """An interrupt by another signal than Ctrl-C, such as that of a scheduler whose time is over."""

    def __init__(self, number: int) -> None:
        super().__init__("the same command goes on from here")
        self.number, self.name = number, signal.Signals(number).name


def _unwind_at_signals() -> None:
    """Let signals that would end the process at once unwind it, so that a run records that it was interrupted.

    Those that are ignored (nohup) or already taken care of stay so.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _unwind)


def _unwind(number: int, frame: FrameType | None) -> None:
    raise StoppedBySignal(number)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, for which PyTorch raises a RuntimeError on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def explain(error: BaseException) -> str | None:
    """Return one sentence for an error that a user can cause, and None for every other."""
    if is_out_of_memory(error):
        return _BROKEN[errno.ENOMEM]
    return None if (said := _explained(error)) is None else _with_near_miss(sentence(said))


def _with_near_miss(sentence: str) -> str:
    """Propose the option or value that was meant, where one of those that are possible is spelt nearly like it."""
    found = re.search(r"(\S+) is not (?:an option|possible): give (?:one of )?(.+)$", sentence)
    if found is None:
        return sentence
    key, _, value = found[1].partition("=")
    wrong = value or key.rpartition(".")[2]
    listed = found[2].split(", ")
    near = difflib.get_close_matches(wrong, listed, 1, 0.7) if wrong not in listed else []
    if not near:
        return sentence
    return f"{sentence[: found.start(2) - len(sentence)]}{found[2]} (did you mean {near[0]}?)"


def _explained(error: BaseException) -> str | None:
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
        case yaml.YAMLError():
            return _of_yaml(error)
        case UnicodeDecodeError() if _through_hydra(error):
            return f"a YAML file of the configuration is not UTF-8 text ({error.reason}): save it as UTF-8"
        case RecursionError() if _through_hydra(error):
            return "a YAML file of the configuration is nested too deeply, or refers to itself: simplify it"
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
        case ValueError() | TypeError() | AttributeError() | AssertionError() if _raised_in_hydra(error):
            # its checks of the command line, or a value of another kind than it takes
            if "Config group override" in str(error) or not isinstance(error, ValueError):
                return "a group (method, model, init, schedule, wandb, experiment) takes the name of one of its files"
            return _one_line(str(error))
    return None


def is_disk_full(error: BaseException) -> bool:
    """Return whether a full disk is the reason, at first or at second hand."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DISK:
            return True
        if _number(cause) in _DISK or "No space left" in str(cause):
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
    if foreign := re.search(r"In '([^']+)': ConfigKeyError.*?Key '([^']+)' not in", text, re.DOTALL):
        return (
            f"the file {foreign[1]}.yaml sets {foreign[2]}, which is not an option: an experiment begins with the line "
            "'# @package _global_', without a byte-order mark before it"
        )
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, _, value = ambiguous[1].partition("=")
        return f"{ambiguous[1]!r} is ambiguous: give {key}=[{value}] for a list, or -m for a sweep"
    return _one_line(text)


def _of_plugin(what: str, extra: str) -> str:
    return f"{what} needs a plugin that is not installed: pip install 'globe-moe[{extra}]'"


def _of_omegaconf(error: OmegaConfBaseException, context: str | None) -> str:
    """Return a sentence with the key, the value and what is allowed, made of OmegaConf's four lines."""
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
"""Patterns of what OmegaConf says, each with what to do about it."""


def _of_disk(error: OSError) -> str | None:
    where = f" {error.filename}" if error.filename else ""
    if is_disk_full(error):
        return f"the disk is full, writing{where} failed: make room, the same command goes on from here"
    number = _number(error)
    if number in _BROKEN:
        return f"reading or writing{where} failed, {_BROKEN[number]}"
    if number in _REFUSED and not error.filename:
        return f"{_one_line(str(error))}: give another output folder"
    if error.errno in _REFUSED or (error.errno == errno.ENOENT and _raised_in_hydra(error)):
        return f"{error.filename} can't be used ({error.strerror}): give another output folder"
    # a missing file is a mistake of ours, unless it is the parent of a run folder that Hydra wants to make
    if number in (None, errno.ENOENT):
        return None
    return f"reading or writing{where} failed ({error.strerror or error}): check the disk, or give another folder"


def _number(error: BaseException) -> int | None:
    """Return the errno of an error, also where safetensors has put it into words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
    return int(found[1] or found[2]) if found else None


def _of_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = "" if mark is None else f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: "
    problem = getattr(error, "problem", None) or str(error)
    return f"a YAML file can't be read ({place}{_one_line(problem)}): correct it, indentation takes no tabs"


def _through_hydra(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("hydra.") for frame, _ in frames)


def _raised_in_hydra(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    modules = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    own = [module for module in modules if module not in ("pathlib", "os", "shutil")]
    return bool(own) and own[-1].startswith("hydra.")


def _one_line(text: str) -> str:
    return " ".join(sentence(text).split())
