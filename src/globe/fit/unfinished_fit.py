"""The checkpoint of a fit that is not finished: written while it runs, read when it goes on.

A folder with `state.json` and one safetensors file that it names. A new tensor file gets a new name, then
`state.json` is replaced, then the old tensor file goes: at every moment one of the two is complete.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from globe.am.records import FitState
from globe.checkpoint.tensorfile import TensorFile
from globe.errors import sentence
from globe.files import read_record, sha256, sync, write_json

_log = logging.getLogger(__name__)
_RECORD = "state.json"


@dataclass(frozen=True, slots=True)
class Fitting:
    """The fit that a state belongs to; a state of another fit is not used."""

    fingerprint: str
    """hash of everything that changes the fit's numbers: configuration, sizes, source tensors, device kind"""
    attempt: int
    """0, or 1 after a failure; decides the seed"""
    step: int
    """last step whose line is in `metrics.jsonl`"""


def write_state(folder: Path, state: FitState, fitting: Fitting) -> None:
    """Write `state` in the place of the last one.

    Raises OSError when the disk refuses; what was there before stays usable then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"state-{secrets.token_hex(4)}.safetensors"
    try:
        save_file(_own_memory(state.tensors), folder / name)
        sync(folder / name)
    except (OSError, SafetensorError) as error:
        (folder / name).unlink(missing_ok=True)
        raise OSError(f"{folder} can't be written: {error}") from error
    record = {
        "fingerprint": fitting.fingerprint,
        "attempt": fitting.attempt,
        "step": fitting.step,
        "tensors": name,
        "sha256": sha256(folder / name),
        "numbers": {key: _pack(value) for key, value in state.numbers.items()},
    }
    write_json(folder / _RECORD, record)
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def read_state(
    folder: Path, fingerprint: str, require: Callable[[FitState], None] = lambda state: None
) -> tuple[FitState, Fitting] | None:
    """Return the state in `folder` if it belongs to the fit with this fingerprint; None if there is none to use.

    `require` raises ValueError for a state that this fit can't go on from.

    A damaged or foreign one is ignored with a warning: the fit then starts anew, which costs time and
    nothing else.
    """
    if not folder.is_dir() or not any(folder.iterdir()):  # empty: a kill in the middle of the first one
        return None
    record = read_record(folder / _RECORD)
    try:
        if record is None:
            raise ValueError(f"it has no readable {_RECORD}")
        if record["fingerprint"] != fingerprint:
            raise ValueError("it belongs to a fit with other options or experts")
        file = folder / Path(record["tensors"]).name
        held = TensorFile(file)  # whose header is bounded, and says how long the file is before it is read
        if sha256(file) != record["sha256"]:
            raise ValueError(f"{file.name} is damaged")
        numbers = {key: _unpack(value) for key, value in record["numbers"].items()}
        fitting = Fitting(fingerprint, record["attempt"], record["step"])
        if type(fitting.step) is not int or fitting.step < 0 or fitting.attempt not in (0, 1):
            raise ValueError("its step or attempt is no count")
        state = FitState({name: held.read(name) for name in held.entries}, numbers)
        require(state)
        return state, fitting
    except (
        OSError,
        ValueError,
        KeyError,
        OverflowError,
        TypeError,
        AttributeError,
        SafetensorError,
    ) as error:
        said = sentence(f"the checkpoint {folder} is ignored, the fit starts anew: {error}")
        _log.warning("%s", said)
        return None


def remove_state(folder: Path) -> None:
    """Remove the state of a fit that is done; the record goes first, so that a kill leaves no half of it."""
    (folder / _RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, none sharing memory with another, which safetensors refuses."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        where = tensor.untyped_storage().data_ptr()
        if where in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    return owned


def _pack(value: float | int | bool | str | None) -> Any:
    """Write floats as float.hex does, which loses nothing and has infinity and NaN, as JSON has not."""
    return {"float": value.hex()} if isinstance(value, float) else value


def _unpack(value: Any) -> float | int | bool | str | None:
    return float.fromhex(value["float"]) if isinstance(value, dict) else value
