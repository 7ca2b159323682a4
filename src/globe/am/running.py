"""A running fit, as the loop holds it and as tensors and plain numbers to continue from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from globe.am.records import FitState, Sizes, StepOptions
from globe.am.state import AMState, Atoms, Constraint, low_rank_atoms, start_state
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.metric import Metric


@dataclass(frozen=True, slots=True)
class Progress:
    """The numbers of a fit beside its state."""

    seed: int
    relfrob_start: float
    step: int = 0
    seconds: float = 0.0
    accepted: int = 0
    rejected: int = 0
    refused_in_a_row: int = 0
    regularised: int = 0
    temperature_factor: float = 1.0
    """what the support control has made of the scheduled temperature"""
    frozen: bool = False
    """whether the support has been cut to its target"""
    low_precision: bool = False
    """whether the curvature products began in bfloat16, so that a fit continues so on another machine"""
    best_validation: float = 1e300
    validations_without: int = 0
    """since the validation error last improved or the support last changed"""


class Best(NamedTuple):
    """A state without its point, whose memory the steps after it have used again."""

    atoms: Atoms
    objective: float
    lam: float
    constraint: Constraint

    @classmethod
    def of(cls, state: AMState) -> Best:
        return cls(state.atoms, state.objective, state.lam, state.constraint)


class Running(NamedTuple):
    """A fit between two steps."""

    state: AMState
    best: Best
    """lowest objective since lam, beta or the support last changed"""
    progress: Progress
    seen: Bool[Tensor, "n m"] | None
    """codes in use at the last validation"""


def snapshot(running: Running, group: ProcessGroup = ALONE) -> FitState:
    """Return everything `restore` needs to continue, with the codes of all processes."""
    state = running.state
    tensors = _pack("now", state.atoms, group) | _pack("anchor", state.anchor, group)
    if running.best.atoms is not state.atoms:
        tensors |= _pack("best", running.best.atoms, group)
    for name, mask in (("support", state.constraint.support), ("seen", running.seen)):
        if mask is not None:
            tensors[name] = group.gather(mask.to(torch.uint8))
    numbers = asdict(running.progress)
    numbers |= {
        f"state.{name}": getattr(state, name) for name in ("momentum_steps", "damping", "lam", "fine")
    }
    return FitState(tensors, numbers | {"state.simplex": state.constraint.simplex})


def require_fitting(saved: FitState, sizes: Sizes) -> None:
    """Raise ValueError unless `restore` can go on with these sizes from a state, which may be out of a damaged file."""
    n, m, r, d, k = sizes.n, sizes.m, sizes.r, sizes.d, sizes.atom_rank
    atoms = {"bank": (m, r, d)} if k is None else {"left": (m, r, k), "right": (m, k, d)}
    wanted = {"codes": (n, m), **atoms}
    names = ["now", "anchor", *(("best",) if "best.codes" in saved.tensors else ())]
    for name in [f"{name}.{field}" for name in names for field in wanted]:
        tensor = saved.tensors.get(name)
        if tensor is None or tuple(tensor.shape) != wanted[name.partition(".")[2]]:
            raise ValueError(f"its tensor {name} is missing or of another size")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"its tensor {name} holds what is no number")
    for name in ("support", "seen"):
        if name in saved.tensors and tuple(saved.tensors[name].shape) != (n, m):
            raise ValueError(f"its tensor {name} is of another size")
    kinds = {field.name: type(field.default) for field in fields(Progress)[2:]} | {
        "seed": int,
        "relfrob_start": float,
    }
    kinds |= {"state.momentum_steps": int, "state.damping": float, "state.lam": float}
    kinds |= {"state.fine": bool, "state.simplex": bool}
    for name, kind in kinds.items():
        value = saved.numbers.get(name)
        right = type(value) is kind or (kind is float and type(value) is int)
        if not right or not isinstance(value, bool | int | float) or not 0 <= value < 1e301:
            raise ValueError(f"its number {name} is none that a fit writes")


def restore(
    saved: FitState,
    X: Float[Tensor, "n p d"],
    options: StepOptions,
    *,
    metric: Metric | None = None,
    group: ProcessGroup = ALONE,
) -> Running:
    """Return the fit that `snapshot` saved; adapters are refit, which gives the same bits on the same machine.

    The state is that of all experts, so that it may go on with another number of processes, up to rounding.
    """
    numbers, tensors = saved.numbers, {name: _own(t, X) for name, t in saved.tensors.items()}
    for name in tensors:
        if name.endswith("codes") or name in ("support", "seen"):
            tensors[name] = group.own(tensors[name])
    masks = {name: tensors[name] > 0 for name in ("support", "seen") if name in tensors}
    constraint = Constraint(masks.get("support"), bool(numbers["state.simplex"]))
    options = replace(options, lam=float(numbers["state.lam"] or 0.0))

    def at_rest(name: str) -> AMState:
        atoms = _unpack(name, tensors)
        return start_state(X, atoms, options, constraint=constraint, metric=metric, group=group)

    state = at_rest("now")._replace(
        anchor=_unpack("anchor", tensors),
        momentum_steps=int(numbers["state.momentum_steps"] or 0),
        damping=float(numbers["state.damping"] or 0.0),
        fine=bool(numbers["state.fine"]),
    )
    best = Best.of(at_rest("best") if "best.codes" in tensors else state)
    progress = Progress(**{field.name: numbers[field.name] for field in fields(Progress)})  # type: ignore[arg-type]
    return Running(state, best, progress, masks.get("seen"))


def _pack(name: str, atoms: Atoms, group: ProcessGroup) -> dict[str, Tensor]:
    kept = {"codes": group.gather(atoms.codes), "left": atoms.left, "right": atoms.right}
    if atoms.left is None:
        kept["bank"] = atoms.bank
    return {f"{name}.{field}": tensor for field, tensor in kept.items() if tensor is not None}


def _unpack(name: str, tensors: dict[str, Tensor]) -> Atoms:
    codes = tensors[f"{name}.codes"]
    if f"{name}.bank" in tensors:
        return Atoms(tensors[f"{name}.bank"], codes)
    return low_rank_atoms(tensors[f"{name}.left"], tensors[f"{name}.right"], codes)


def _own(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a copy in memory of our own: products of tensors at other alignments can differ in the last bit."""
    if tensor.is_floating_point():
        return tensor.to(device=like.device, dtype=like.dtype, copy=True)
    return tensor.to(device=like.device, copy=True)
