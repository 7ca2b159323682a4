"""The Gauss-Newton move from its dense normal matrix, one unit move of an unknown at a time."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from reference import ReferencePoint
from torch import Tensor


class Moves(NamedTuple):
    """Unit moves of the unknowns and the change of all mixed bases that each makes."""

    names: list[tuple[str, tuple[int, ...]]]
    changes: Float[Tensor, "u n r d"]


def unit_moves(
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    *,
    left: Float[Tensor, "m r k"] | None,
    right: Float[Tensor, "m k d"] | None,
    free: Bool[Tensor, "n m"] | None,
    joint: bool,
) -> Moves:
    n, m = codes.shape
    names: list[tuple[str, tuple[int, ...]]] = []
    changes = []

    def add(name: str, index: tuple[int, ...], change: Tensor) -> None:
        names.append((name, index))
        changes.append(change)

    def of_atom(j: int, change: Tensor) -> Tensor:
        return torch.stack([codes[i, j] * change for i in range(n)])

    if left is None or right is None:
        for j, a, b in itertools.product(*map(range, bank.shape)):
            unit = torch.zeros_like(bank[0])
            unit[a, b] = 1
            add("bank", (j, a, b), of_atom(j, unit))
    else:
        for j, a, b in itertools.product(*map(range, left.shape)):
            unit = torch.zeros_like(left[0])
            unit[a, b] = 1
            add("left", (j, a, b), of_atom(j, unit @ right[j]))
        for j, a, b in itertools.product(*map(range, right.shape)):
            unit = torch.zeros_like(right[0])
            unit[a, b] = 1
            add("right", (j, a, b), of_atom(j, left[j] @ unit))
    if joint:
        for i, j in itertools.product(range(n), range(m)):
            if free is None or bool(free[i, j]):
                change = torch.zeros(n, *bank.shape[1:], dtype=bank.dtype)
                change[i] = bank[j]
                add("codes", (i, j), change)
    return Moves(names, torch.stack(changes))


def gauss_newton(
    at: ReferencePoint,
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    *,
    damping: dict[str, float],
    left: Float[Tensor, "m r k"] | None = None,
    right: Float[Tensor, "m k d"] | None = None,
    free: Bool[Tensor, "n m"] | None = None,
    joint: bool = True,
    ridge: float = 0.0,
    force: Float[Tensor, "n r d"] | None = None,
) -> dict[str, Tensor]:
    """The minimiser d of the quadratic model, from its dense normal matrix.

    sum_i <A_i^T A_i (J_i * dY_i)(I - P_i), J_i * dY_i> - 2 <force_i, dY_i> + damping ||d||^2 + ridge ||bank + dB||^2.
    Where the codes have independent columns, ||dB||^2 stands for sum_i ||dY_i(dB)||^2 = <dB, (codes^T codes) dB>, and
    likewise in the ridge. With low-rank atoms the ridge is on the left factors.
    """
    names, changes = unit_moves(bank, codes, left=left, right=right, free=free, joint=joint)
    gram = at.adapters.mT @ at.adapters
    seen = changes * at.slopes
    weighted = gram @ seen @ at.kept
    H = weighted.flatten(1) @ seen.flatten(1).T
    g = changes.flatten(1) @ (at.force if force is None else force).flatten()

    independent = left is None and len(codes) >= len(bank) and torch.linalg.cond(codes) < 1e3
    overlap = codes.T @ codes if independent else torch.eye(len(bank), dtype=bank.dtype)
    first = bank if left is None else left
    for u, (name, index) in enumerate(names):
        for v, (other, there) in enumerate(names):
            if name != other:
                continue
            if name == "bank":
                metric = float(overlap[index[0], there[0]]) * (index[1:] == there[1:])
            else:
                metric = float(index == there)
            H[u, v] += (damping[name] + (ridge if name in ("bank", "left") else 0.0)) * metric
            if name in ("bank", "left"):
                g[u] -= ridge * metric * first[there]
    solution = torch.linalg.solve(H, g)
    found = {"codes": torch.zeros_like(codes)} if joint else {}
    for name, like in (("bank", bank), ("left", left), ("right", right)):
        if like is not None and any(name == known for known, _ in names):
            found[name] = torch.zeros_like(like)
    for value, (name, index) in zip(solution, names, strict=True):
        found[name][index] = value
    return found
