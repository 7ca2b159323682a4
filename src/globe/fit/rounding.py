"""Factors of few bits: atoms rounded, adapters refitted to them and rounded with feedback, atoms moved to fit those.

Rounds of this go on for as long as the true error falls. All is measured where the fit is: on D_i X_i L_i, with the row
weights D_i and the metric L_i of the inputs, or on X_i itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.tangent import tangent
from globe.am.objective import Point
from globe.am.records import Factors
from globe.am.refit import refit
from globe.am.state import Atoms, Constraint, low_rank_atoms
from globe.bank.coded import Coded
from globe.bank.compose import factor_bases
from globe.bank.feedback import round_with_feedback
from globe.bank.gauge import allocate_bits, balanced_gauge, column_factors, share_bits
from globe.bank.packing import Packed
from globe.bank.precision import Precision
from globe.bank.rounding import AnyGrid, Grid, Rounded, round_nearest
from globe.bank.steps import choose_steps
from globe.errors import FitError
from globe.numerics.activation import phi_prime
from globe.numerics.chunks import expert_chunks
from globe.numerics.figures import squared_norms
from globe.numerics.input_metric import InputMetric

_ROUNDS = 3
"""At most: moves of the atoms around rounded adapters."""
_WORTH = 5e-3
"""A round that lowers the error by less than this share of it is the last."""
_TRIES = 6
"""Choices of steps for coded adapters, at most."""
_FIRST, _FULL = 0.98, 0.995
"""Share of the bits that the first choice aims at, and that is enough."""
_ITERATIONS, _DAMPING = 20, 1e-4


class RoundedFactors(NamedTuple):
    """Factors as they are read back, and what is stored of them."""

    factors: Factors
    """W_i - mean ~ adapters_i phi_lam(sum_j codes_ij bank_j), with the normalisation's scale in the adapters"""
    packed: dict[str, Packed | Coded]
    """adapters, and bank or atoms_left and atoms_right"""
    error: float
    """sum of the squared errors, in the metric"""
    rounds: int
    """moves of the atoms that were kept"""


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """What stays the same while one bank is rounded."""

    X: Float[Tensor, "n p d"]
    lam: float
    activation: str
    precision: Precision
    metric: InputMetric | None
    scale: Tensor | None
    dtype: torch.dtype
    aims: list[tuple[float, Coded]]
    """bits that steps were last chosen for, and the coded adapters that they gave; empty before"""

    def parts(self, r: int) -> Iterator[slice]:
        n, p, d = self.X.shape
        return expert_chunks(n, max(r, p), d)

    def seen_bases(self, atoms: Atoms, part: slice) -> Float[Tensor, "c r d"]:
        """Return phi(Y_i) L_i of some experts, from the factors that are exported."""
        M = factor_bases(atoms, part, lam=self.lam, activation=self.activation).to(self.X)
        return M if self.metric is None else self.metric.bases(M, part)

    def target(self, part: slice) -> Float[Tensor, "c p d"]:
        """Return D_i X_i L_i."""
        return self.X[part] if self.metric is None else self.metric.seen(self.X[part], part)

    def stored(self, A: Float[Tensor, "c p r"], part: slice) -> Float[Tensor, "c p r"]:
        """Return adapters of D_i X_i L_i as those of the experts W_i themselves."""
        own = self.unscaled(A, part)
        return own if self.scale is None else own * self._row_scale(part)

    def unscaled(self, A: Float[Tensor, "c p r"], part: slice) -> Float[Tensor, "c p r"]:
        """Return adapters of D_i X_i L_i as those of X_i."""
        return A if self.metric is None else self.metric.adapters(A, part)

    def coupled(self, part: slice) -> Float[Tensor, "c p p"] | None:
        """Return D_i^T D_i where rows are coupled, as seen by what is stored."""
        rows = None if self.metric is None else self.metric.rows
        if rows is None or rows.dim() == 2:
            return None
        own = rows[part]
        if self.scale is not None and self.scale.dim() == 2:
            own = own / self.scale[part, None].to(own)
        return own.mT @ own

    def stored_weights(self, part: slice) -> Float[Tensor, "c p"]:
        """Return what the square of a row counts for, of adapters as they are stored."""
        count, p = self.X[part].shape[:2]
        rows = self.X.new_ones(count, p)
        if self.metric is not None:
            rows = self.metric.row_squares(part, self.X)
        return rows if self.scale is None else rows / self._row_scale(part)[..., 0].square()

    def fitted(self, A: Float[Tensor, "c p r"], part: slice) -> Float[Tensor, "c p r"]:
        """Undo `stored`."""
        own = A if self.scale is None else A / self._row_scale(part)
        return own if self.metric is None else self.metric.weighted(own, part)

    def _row_scale(self, part: slice) -> Tensor:
        assert self.scale is not None
        own = self.scale[part].to(self.X)
        return own.reshape(*own.shape, *[1] * (3 - own.dim()))


def round_factors(
    X: Float[Tensor, "n p d"],
    factors: Factors,
    precision: Precision,
    *,
    lam: float,
    activation: str,
    export_dtype: torch.dtype,
    scale: Tensor | None = None,
    metric: InputMetric | None = None,
) -> RoundedFactors:
    """Round the factors of a fit so that the error on the normalised experts X grows as little as it can.

    First the gauge: balanced and diagonal where phi is linear, columns in the order of what they matter otherwise; the
    bits of the adapters' columns are shared out by what these matter (`allocate_bits`). Then rounds: atoms are rounded,
    adapters are refitted to them with the ridge of the expected noise and rounded with feedback in the metric of their
    own bases (M_i L_i)(M_i L_i)^T, and atoms and codes make a Gauss-Newton step around the rounded adapters. A round
    counts only if the error of what would be stored falls.

    scale     what the normalisation divided by, (n,) or (n, p); the adapters are rounded with it folded in
    Raises FitError when numbers are no longer finite.
    """
    task = _Task(X, lam, activation, precision, metric, scale, export_dtype, [])
    codes = factors.codes.to(export_dtype).to(X)
    atoms = Atoms(factors.bank, codes, factors.left, factors.right)
    atoms = _in_gauge(task, atoms, linear=lam == 0 or activation == "identity")
    # draws the sketch of a preconditioner, and nothing that a result depends on but by its rounding
    generator = torch.Generator().manual_seed(0)
    best, wanted = None, atoms
    for at in range(_ROUNDS + 1):
        found, rounded = _round_once(task, wanted, at)
        if best is not None and not found.error < best.error:
            break
        small = best is not None and found.error > (1 - _WORTH) * best.error
        best = found
        if small or at == _ROUNDS:
            break
        wanted = _moved(task, wanted, rounded, found, generator)
    assert best is not None
    return best


def _in_gauge(task: _Task, atoms: Atoms, *, linear: bool) -> Atoms:
    """Return atoms in the gauge that rounding wants, with the same products A_i M_i at best adapters."""
    r = atoms.bank.shape[1]
    K = task.X.new_zeros(r, r)
    G = task.X.new_zeros(r, r)
    for part in task.parts(r):
        M = task.seen_bases(atoms, part)
        A = refit(task.target(part), M, lambda_A=task.precision.ridge).adapters
        K += (M @ M.mT).sum(dim=0)
        G += (A.mT @ A).sum(dim=0)
    if linear:
        T, _ = balanced_gauge(K, G)
        if atoms.left is None or atoms.right is None:
            return atoms._replace(bank=T @ atoms.bank)
        return low_rank_atoms(T @ atoms.left, atoms.right, atoms.codes)
    order = (K.diagonal() * G.diagonal()).argsort(descending=True, stable=True)
    if atoms.left is None or atoms.right is None:
        return atoms._replace(bank=atoms.bank[:, order])
    return low_rank_atoms(atoms.left[:, order], atoms.right, atoms.codes)


def _round_once(task: _Task, wanted: Atoms, rounds: int) -> tuple[RoundedFactors, Atoms]:
    """Round the atoms, refit and round the adapters: return what would be stored, and its atoms as they are read."""
    atoms, packed = _round_atoms(task, wanted)
    n, p, _ = task.X.shape
    r = atoms.bank.shape[1]
    A, ridge = task.X.new_empty(n, p, r), task.precision.ridge
    weights = task.X.new_empty(n, r)
    for part in task.parts(r):
        M = task.seen_bases(atoms, part)
        A[part] = refit(task.target(part), M, lambda_A=ridge).adapters
        weights[part] = M.square().sum(dim=2)
    stored = packed["adapters"] = (_coded if task.precision.coded else _packed)(task, atoms, A, weights)
    exported, error = stored.values(task.dtype), 0.0
    for part in task.parts(r):
        M = task.seen_bases(atoms, part)
        left = task.target(part) - task.fitted(exported[part].to(M), part) @ M
        error += float(squared_norms(left).sum())
    codes = atoms.codes.to(task.dtype)
    factors = Factors(
        atoms.bank.to(task.dtype),
        codes,
        exported,
        None if atoms.left is None else atoms.left.to(task.dtype),
        None if atoms.right is None else atoms.right.to(task.dtype),
    )
    if not bool(torch.isfinite(torch.tensor(error))):
        raise FitError("the rounded factors are not finite: give more bits, or export_dtype=bfloat16")
    return RoundedFactors(factors, packed, error, rounds), atoms


def _packed(task: _Task, atoms: Atoms, A: Float[Tensor, "n p r"], weights: Float[Tensor, "n r"]) -> Packed:
    """Return adapters with bits set apart for every row and column."""
    grid, columns = _shared_bits(task, A, weights)
    return Packed.of(_fed(task, atoms, A, grid, columns), columns)


def _coded(task: _Task, atoms: Atoms, A: Float[Tensor, "n p r"], weights: Float[Tensor, "n r"]) -> Coded:
    """Return adapters whose integers are coded, in no more bits than there are.

    What integers cost, and what errors that are fed on cost in bits, is known afterwards alone: so the steps are chosen
    again until they fit, and integers by the bits that those before took.
    """
    n, p, r = A.shape
    stored = torch.cat([task.stored(A[part], part) for part in task.parts(r)])
    rows = torch.cat([task.stored_weights(part) for part in task.parts(r)])
    allowed, best = n * p * task.precision.row_bits(r), None
    total, last = task.aims[-1] if task.aims else (allowed * _FIRST, None)
    slope, before = 1.0, None
    for at in range(3 * _TRIES):
        grid, columns = choose_steps(stored, rows, weights.mean(dim=0), total)
        if last is not None:
            grid = replace(grid, sizes=last.sizes(columns))
        found = Coded.of(_fed(task, atoms, A, grid, columns), columns)
        bits = 8 * len(found.words)
        known, last = last is not None, found
        if known and bits <= allowed and (best is None or bits > 8 * len(best.words)):
            best = found
        if best is not None and (bits >= _FULL * allowed or at >= _TRIES):
            break
        # bits rarely grow as what steps are chosen for: the last two choices say how they do
        now = (math.log(total), math.log(bits))
        if before is not None and now[0] != before[0]:
            slope = min(2.0, max(0.1, (now[1] - before[1]) / (now[0] - before[0])))
        total *= (allowed * (1 + _FULL) / 2 / bits) ** (1 / slope)
        before = now if known else None
    if best is None:
        raise FitError("the coded adapters do not fit their bits: give more bits, or bank.coded=false")
    task.aims[:] = [(total, best)]
    return best


def _fed(
    task: _Task, atoms: Atoms, A: Float[Tensor, "n p r"], grid: AnyGrid, columns: Float[Tensor, " r"]
) -> Rounded:
    """Return the adapters rounded with feedback in the metric of their own bases."""
    found = []
    for part in task.parts(A.shape[2]):
        seen = task.seen_bases(atoms, part) * columns[:, None]
        own = task.stored(A[part], part) / columns
        found.append(round_with_feedback(own, seen @ seen.mT, grid.of_rows(part), rows=task.coupled(part)))
    codes, scale = (torch.cat([getattr(one, name) for one in found]) for name in ("codes", "scale"))
    return Rounded(codes, scale, grid)


def _shared_bits(
    task: _Task, A: Float[Tensor, "n p r"], weights: Float[Tensor, "n r"]
) -> tuple[AnyGrid, Float[Tensor, " r"]]:
    """Return how the adapters are rounded, and what their columns are divided by before.

    `weights` are |row k of M_i L_i|^2. Without groups of columns the bits are shared out over rows as well.
    """
    n, p, r = A.shape
    squares, mean = A.square().mean(dim=(0, 1)), weights.mean(dim=0)
    bits = allocate_bits((squares * mean).tolist(), task.precision.row_bits(r))
    group = task.precision.group_adapters
    if group is not None:
        return Grid.of(bits, r, group), column_factors(squares, mean, bits)
    rows = A.new_empty(n, p)
    for part in task.parts(r):
        own = task.unscaled(A[part], part)
        rows[part] = (own.square() @ weights[part, :, None])[..., 0]
        if task.metric is not None:
            rows[part] *= task.metric.row_squares(part, task.X)
    grid = share_bits(rows, squares * mean, n * p * task.precision.row_bits(r))
    if grid is None:
        return Grid.of(bits, r, r), column_factors(squares, mean, bits)
    return grid, column_factors(squares, mean, bits)


def _round_atoms(task: _Task, wanted: Atoms) -> tuple[Atoms, dict[str, Packed | Coded]]:
    """Return atoms as they are read back, in the dtype of the fit, and as they are stored."""
    packed: dict[str, Packed | Coded] = {}

    def rounded(tensor: Tensor, name: str) -> Tensor:
        grid = Grid.of(task.precision.atoms, tensor.shape[-1], task.precision.group_atoms)
        one = packed[name] = Packed.of(round_nearest(tensor, grid))
        return one.values(task.dtype).to(tensor)

    if wanted.left is None or wanted.right is None:
        return wanted._replace(bank=rounded(wanted.bank, "bank")), packed
    left, right = rounded(wanted.left, "atoms_left"), rounded(wanted.right, "atoms_right")
    return low_rank_atoms(left, right, wanted.codes), packed


def _moved(
    task: _Task, wanted: Atoms, rounded: Atoms, found: RoundedFactors, generator: torch.Generator
) -> Atoms:
    """Take a Gauss-Newton step of atoms and codes for the adapters as they are rounded, from the atoms as they are."""
    X, adapters = task.X, found.factors.adapters
    n, _, d = X.shape
    r = wanted.bank.shape[1]
    gram, force = X.new_empty(n, r, r), X.new_empty(n, r, d)
    slope = None if task.lam == 0 or task.activation == "identity" else X.new_empty(n, r, d)
    errors = X.new_empty(n)
    columns = None if task.metric is None else task.metric.columns
    for part in task.parts(r):
        Y = torch.tensordot(wanted.codes[part], wanted.bank, dims=1)
        M = task.seen_bases(wanted, part)
        A = task.fitted(adapters[part].to(X), part)
        left = task.target(part) - A @ M
        errors[part] = left.square().sum(dim=(1, 2))
        gram[part], force[part] = A.mT @ A, A.mT @ left
        if columns is not None:
            force[part] = columns.adjoint(force[part], part)
        if slope is not None:
            J = phi_prime(Y, lam=task.lam, activation=task.activation)
            assert J is not None
            slope[part] = J
            force[part] *= J
    # no rows are projected out: the adapters stay as they are
    rows, free, total = X.new_zeros(n, r, d), torch.zeros_like(errors), float(errors.sum())
    point = Point(None, gram, rows, slope, force, errors, free, total, total, 0, columns)
    slopes = tangent(wanted.bank, wanted.codes, left=wanted.left, right=wanted.right, joint=True)
    direction = gauss_newton_direction(
        slopes, point, cg_iterations=_ITERATIONS, damping=_DAMPING, generator=generator
    )
    moved = wanted.moved(direction.move, Constraint(), joint=True)
    return moved.with_codes(moved.codes.to(task.dtype).to(X))
