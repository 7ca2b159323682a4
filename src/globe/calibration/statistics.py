"""The statistics of one layer's routed experts on a calibration text: the record, and its file.

Symbols: n experts, p rows of gate and up (the intermediate size), d columns (the hidden size). Expert i gets the
inputs x of the tokens routed to it, each with the gate value g that weights its output; h is what goes into its down
projection. Every mean of expert i is weighted by g^2, the weight of a token in the squared error of the layer's output.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from globe.checkpoint.tensorfile import TensorFile
from globe.errors import ArtefactError
from globe.files import parse_json

FORMAT_VERSION = 2
METADATA_KEY = "globe"
EVEN = 0.3
"""Share of the mean that every direction of the output gets beside its own weight: F is of errors without size, and
with less of it errors grow where F is small until it holds no longer."""


@dataclass(frozen=True, slots=True, eq=False)
class SecondMoments:
    """sum g^2 v v^T / sum g^2 of the vectors v of n experts, q numbers each, in float32.

    Either whole matrices, or F F^T + diag(s) of rank k plus a diagonal, which keeps the trace and the diagonal exactly.
    An expert without tokens has zeros.
    """

    matrix: Float[Tensor, "n q q"] | None = None
    factor: Float[Tensor, "n q k"] | None = None
    diagonal: Float[Tensor, "n q"] | None = None

    @property
    def n(self) -> int:
        return self._any.shape[0]

    @property
    def q(self) -> int:
        return self._any.shape[1]

    def dense(self, experts: slice | Sequence[int] = slice(None)) -> Float[Tensor, "e q q"]:
        """Return the matrices of some experts, all by default: q^2 numbers for each."""
        if self.matrix is not None:
            return self.matrix[experts]
        assert self.factor is not None
        assert self.diagonal is not None
        part = self.factor[experts]
        return part @ part.mT + torch.diag_embed(self.diagonal[experts])

    @property
    def _any(self) -> Tensor:
        found = self.matrix if self.matrix is not None else self.factor
        assert found is not None
        return found


@dataclass(frozen=True, slots=True, eq=False)
class OutputWeights:
    """The Fisher information of the output y of a layer's experts: an error e of it costs e^T F e / 2 nats.

    F = E[s s^T] over tokens, s the derivative by y of the log probability of tokens drawn from the model's own
    distributions (Kullback and Leibler 1951: to second order their divergence is that of the error in F).
    """

    F: Float[Tensor, "d d"]
    down: Float[Tensor, "n p"]
    """down_k^T F down_k / ||down_k||^2, what the direction in which unit k of each expert writes counts for"""

    @property
    def mean(self) -> float:
        """The mean eigenvalue of F."""
        return float(self.F.diagonal().double().mean())

    @property
    def matrix(self) -> Float[Tensor, "d d"]:
        """F with `EVEN` of its mean eigenvalue in every direction, in float64."""
        even = torch.eye(len(self.F), dtype=torch.float64) * (EVEN * self.mean)
        return (self.F.double() + even) / (1 + EVEN)

    @property
    def of_rows(self) -> Float[Tensor, "n p"]:
        """The same of every down_k."""
        return (self.down + EVEN * self.mean) / (1 + EVEN)


@dataclass(frozen=True, slots=True, eq=False)
class LayerStatistics:
    """What the routed experts of one layer did on a calibration text. Row i is routed expert i, all n of them.

    The error that compressing up or gate makes in the output of expert i is, to first order,
    gate2_i sum_k rows_ik (dW_i C_i dW_i^T)_kk, that of down is gate2_i trace(dW_i H_i dW_i^T).
    """

    layer: int
    inputs: SecondMoments
    """of x, d numbers"""
    inner: SecondMoments
    """of h, p numbers"""
    counts: Float[Tensor, " n"]
    """tokens of each expert"""
    gate2: Float[Tensor, " n"]
    """sum of g^2"""
    rows_up: Float[Tensor, "n p"]
    """mean of (dh_k / du_k)^2 ||down_k||^2, with u = up x: for a gated unit, of act(gate x)_k^2 ||down_k||^2"""
    rows_gate: Float[Tensor, "n p"] | None
    """the same for gate x; None where the experts have no gate"""
    reap: Float[Tensor, " n"]
    """sum of g ||expert output||, the pruning score of REAP; divide by the counts for its mean"""
    output: OutputWeights | None = None
    """what an error of the layer's output costs; None where it has not been measured, and all directions are alike"""

    @property
    def C(self) -> Float[Tensor, "n d d"]:
        return self.inputs.dense()

    @property
    def H(self) -> Float[Tensor, "n p p"]:
        return self.inner.dense()

    def rows(self, family: str) -> Float[Tensor, "n p"]:
        """Return what depends on each row of up or gate, with the directions of the output weighted."""
        rows = self.rows_up if family == "up" else self.rows_gate
        assert rows is not None, "experts without a gate have no family gate"
        return rows if self.output is None else rows * self.output.of_rows


_MOMENTS = {"C": "inputs", "H": "inner"}
_PARTS = ("matrix", "factor", "diagonal")
_VECTORS = ("counts", "gate2", "rows_up", "rows_gate", "reap")


def write_statistics(statistics: LayerStatistics, path: Path, *, key: str = "") -> None:
    """Write the file of one layer, whole or not at all. `key` is stored with it, and asked for by the reader.

    Raises ArtefactError when the disk refuses.
    """
    tensors = {
        f"{name}.{part}": value
        for name, attribute in _MOMENTS.items()
        for part in _PARTS
        if (value := getattr(getattr(statistics, attribute), part)) is not None
    }
    tensors |= {name: value for name in _VECTORS if (value := getattr(statistics, name)) is not None}
    _write(tensors, path, layer=statistics.layer, key=key)


def write_output(output: OutputWeights, path: Path, *, layer: int, key: str = "") -> None:
    """Write the weights of one layer's output likewise."""
    _write({"F": output.F, "down": output.down}, path, layer=layer, key=key)


def _write(tensors: dict[str, Tensor], path: Path, *, layer: int, key: str) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = json.dumps({"format_version": FORMAT_VERSION, "layer": layer, "key": key}, sort_keys=True)
    fresh = path.with_name(f".{path.name}.globe-{secrets.token_hex(4)}")  # which `clear_files` knows
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.touch()
        mode = fresh.stat().st_mode
        save_file(tensors, fresh, metadata={METADATA_KEY: header})
        fresh.chmod(mode)  # safetensors makes its file readable by the owner alone, whatever the umask says
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"{path} can't be written ({error}): free space or give another folder"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def read_statistics(path: Path, *, key: str | None = None) -> LayerStatistics:
    """Return the statistics of a layer. Raises ArtefactError if the file is missing, damaged or of another `key`."""
    return _checked(*_read(path, key), path)


def read_output(path: Path, *, key: str | None = None) -> OutputWeights:
    """Return the weights of a layer's output likewise."""
    tensors, _ = _read(path, key)
    try:
        output = OutputWeights(tensors["F"], tensors["down"])
    except KeyError as error:
        raise ArtefactError(f"{path} is damaged ({error}): calibrate again") from error
    whole = all(one.dtype == torch.float32 and bool(torch.isfinite(one).all()) for one in tensors.values())
    square = output.F.dim() == 2 and output.F.shape[0] == output.F.shape[1]
    if not whole or not square or output.down.dim() != 2:
        raise ArtefactError(f"{path} is damaged (sizes or numbers do not fit): calibrate again")
    return output


def _read(path: Path, key: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header of a file."""
    try:
        file = TensorFile(path)
        header = parse_json(file.metadata.get(METADATA_KEY, "null").encode())
        tensors = {name: file.read(name) for name in file.entries}
    except ValueError as error:
        raise ArtefactError(f"{path} can't be read ({error}): calibrate again") from error
    if not isinstance(header, dict) or header.get("format_version") != FORMAT_VERSION:
        raise ArtefactError(f"{path} is not a file of statistics that can be read here: calibrate again")
    if key is not None and header.get("key") != key:
        raise ArtefactError(f"{path} is of another model, text or size: calibrate again")
    return tensors, header


def is_complete(path: Path, *, key: str) -> bool:
    """Return whether there is a whole file of this `key`, by header and length; its content is checked later."""
    try:
        header = parse_json(TensorFile(path).metadata.get(METADATA_KEY, "null").encode())
    except ValueError:
        return False
    return isinstance(header, dict) and (header.get("format_version"), header.get("key")) == (
        FORMAT_VERSION,
        key,
    )


def _checked(tensors: dict[str, Tensor], header: dict[str, Any], path: Path) -> LayerStatistics:
    """Return the record of the tensors of a file, with shapes that agree and finite numbers."""
    try:
        moments = {
            attribute: SecondMoments(**{part: tensors.get(f"{name}.{part}") for part in _PARTS})
            for name, attribute in _MOMENTS.items()
        }
        vectors = {name: tensors.get(name) if name == "rows_gate" else tensors[name] for name in _VECTORS}
        statistics = LayerStatistics(layer=header["layer"], **moments, **vectors)  # type: ignore[arg-type]
        n, p, d = statistics.inputs.n, statistics.inner.q, statistics.inputs.q
    except (KeyError, TypeError, ValueError, IndexError, AssertionError) as error:
        raise ArtefactError(f"{path} is damaged ({error}): calibrate again") from error
    rows = {(n, p)} if statistics.rows_gate is None else {tuple(statistics.rows_gate.shape), (n, p)}
    agree = (
        isinstance(header["layer"], int)
        and all(one.dtype in (torch.float32, torch.float64) for one in tensors.values())
        and statistics.inner.n == n
        and rows == {tuple(statistics.rows_up.shape)}
        and all(tuple(getattr(statistics, name).shape) == (n,) for name in ("counts", "gate2", "reap"))
        and all(_is_whole(moment) for moment in (statistics.inputs, statistics.inner))
    )
    if not agree or d < 1 or not all(bool(torch.isfinite(one).all()) for one in tensors.values()):
        raise ArtefactError(f"{path} is damaged (sizes or numbers do not fit): calibrate again")
    return statistics


def _is_whole(moment: SecondMoments) -> bool:
    n, q = moment.n, moment.q
    if moment.matrix is not None:
        return tuple(moment.matrix.shape) == (n, q, q)
    factor, diagonal = moment.factor, moment.diagonal
    if factor is None or diagonal is None:
        return False
    return factor.dim() == 3 and tuple(factor.shape[:2]) == (n, q) and tuple(diagonal.shape) == (n, q)
