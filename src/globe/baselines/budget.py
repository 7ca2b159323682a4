"""The largest size of each baseline that a budget of kept parameters allows, counted exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import floor

from globe.baselines.records import BaselineSizes
from globe.config.choices import Method
from globe.errors import ConfigError

ADAPTER_SHARE = Fraction(3, 4)
"""Where r is not given, adapters may take this share of the budget; the rest is for the bank."""


def allowed_parameters(budget: float | int, *, n: int, p: int, d: int) -> int:
    """Return the parameters that `budget` allows to keep: a share (float, 0 to 1) of n p d, or a number (int)."""
    if isinstance(budget, bool) or not budget > 0 or (isinstance(budget, float) and budget > 1):
        raise ConfigError(
            f"budget={budget!r} is not possible: give a share from 0 to 1, or a number of parameters"
        )
    return budget if isinstance(budget, int) else floor(Fraction(budget) * n * p * d)


def resolve_sizes(
    method: Method | str,
    *,
    n: int,
    p: int,
    d: int,
    budget: float | int | None = None,
    m: int | None = None,
    r: int | None = None,
    atom_rank: int | None = None,
) -> BaselineSizes:
    """Return the sizes of `method` for n experts of p x d.

    Sizes that are given stay; the others are the largest that `budget` allows. Without any, a method with a
    bank begins with the first r of p (as published), 3p/4, p/2, p/4 and below whose adapters take at most three
    quarters of the budget, takes the largest m (SLBF: k) for it, and lets r grow into what is left. Raises
    ConfigError where a size does not belong to the method, sizes are missing, or nothing fits.
    """
    method = Method(method)
    if method is Method.globe:
        raise ConfigError(
            "method=globe is what baselines are measured against: its sizes are bank.m and bank.r"
        )
    limit = None if budget is None else allowed_parameters(budget, n=n, p=p, d=d)
    _refuse_foreign(method, m=m, atom_rank=atom_rank)
    match method:
        case Method.svd | Method.mean_svd:
            sizes = _grow(BaselineSizes(method, n, p, d, n, r or 1), "r", r, min(p, d), limit)
        case Method.shared_basis:
            sizes = _grow(BaselineSizes(method, n, p, d, 1, r or 1), "r", r, min(n * p, d), limit)
        case Method.rtn | Method.gptq | Method.gptq_rotated:
            raise ConfigError(f"{method} rounds all weights: give bits, and no sizes or share to keep")
        case Method.slbf:
            first = _published_rank(method, n, p, d, limit) if r is None and atom_rank is None else r or 1
            sizes = BaselineSizes(method, n, p, d, n, first, atom_rank or 1)
            sizes = _grow(sizes, "atom_rank", atom_rank, min(first, d), limit)
            sizes = _grow(sizes, "r", r, min(p, d), limit)
        case _:
            first = _published_rank(method, n, p, d, limit) if r is None and m is None else r or 1
            sizes = _grow(BaselineSizes(method, n, p, d, m or 1, first), "m", m, n, limit)
            sizes = _grow(sizes, "r", r, min(p, d), limit)
    _check(sizes, limit)
    return sizes


def _refuse_foreign(method: Method, *, m: int | None, atom_rank: int | None) -> None:
    if m is not None and method in (Method.svd, Method.mean_svd, Method.shared_basis, Method.slbf):
        raise ConfigError(f"{method} has a fixed number of atoms: leave out m")
    if atom_rank is not None and method is not Method.slbf:
        raise ConfigError(f"{method} has full-rank atoms: leave out atom_rank")


def _published_rank(method: Method, n: int, p: int, d: int, limit: int | None) -> int:
    if limit is None:
        raise ConfigError(
            f"{method} needs sizes or a budget: give budget, or its sizes (r with m or atom_rank)"
        )

    def fits(r: int) -> bool:
        least = BaselineSizes(method, n, p, d, n if method is Method.slbf else 1, r, 1)
        return n * p * r <= ADAPTER_SHARE * limit and least.parameters <= limit

    named = [min(max(1, p * quarters // 4), d) for quarters in (4, 3, 2, 1)]
    r = next((r for r in named if fits(r)), 0) or _largest(fits, named[-1])
    if r == 0:
        raise ConfigError(f"{method} does not fit into {limit} parameters: give a larger budget")
    return r


def _grow(sizes: BaselineSizes, name: str, given: int | None, most: int, limit: int | None) -> BaselineSizes:
    """Return the sizes with `name` as given, or the largest up to `most` within `limit`; parameters grow with it."""
    if given is not None:
        return sizes
    if limit is None:
        raise ConfigError(f"{sizes.method} needs sizes or a budget: give {name} or budget")

    def resized(size: int) -> BaselineSizes:
        match name:
            case "m":
                return replace(sizes, m=size)
            case "r":
                return replace(sizes, r=size)
            case _:
                return replace(sizes, atom_rank=size)

    return resized(max(1, _largest(lambda size: resized(size).parameters <= limit, most)))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest integer in [0, most] that fits, 0 where not even 1 does; what fits has no gaps."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _check(sizes: BaselineSizes, limit: int | None) -> None:
    columns = (
        min(sizes.n * sizes.p, sizes.d) if sizes.method is Method.shared_basis else min(sizes.p, sizes.d)
    )
    for name, value, most in (
        ("m", sizes.m, sizes.n),
        ("r", sizes.r, columns),
        ("atom_rank", sizes.atom_rank, min(sizes.r, sizes.d)),
    ):
        if value is not None and not 1 <= value <= most:
            raise ConfigError(
                f"{name}={value} is not possible for {sizes.method}: give an integer from 1 to {most}"
            )
    if limit is not None and sizes.parameters > limit:
        raise ConfigError(
            f"{sizes.method} with m={sizes.m}, r={sizes.r} keeps {sizes.parameters} parameters, more than "
            f"the budget of {limit}: give a larger budget or smaller sizes"
        )
