"""What a fit costs, from its sizes alone: the multiply-adds of a step, and the memory it needs at most."""

from __future__ import annotations

from globe.am.records import Sizes
from globe.config.choices import Family, Metric
from globe.config.schema import Config, TrainConfig, chosen_metric, is_linear
from globe.numerics.chunks import chunk_size, product_chunk_size

REFERENCE_RATE = 2e10
"""Multiply-adds a second of the reference core, in float32: what one thread of a recent x86 server does in this mix."""
REFERENCE_OVERHEAD = 0.018
"""Seconds a step in the starting of kernels on that core: nearly all there is for experts of 48 x 64."""
EVALUATIONS = 1.15
"""Of a Gauss-Newton step: one, and another when the extrapolated point is refused."""
USUAL_ITERATIONS = 9
"""Of conjugate gradients in a step that the truncation test ends: 7 to 10 on average of 60 steps, on four banks."""
_SKETCH = 4
"""Columns of the preconditioner's sketch."""


def step_work(
    sizes: Sizes,
    *,
    cg_iterations: int,
    joint: bool = True,
    coding_every: int = 5,
    evaluate_every: int = 5,
    in_metric: bool = False,
) -> float:
    """Return the multiply-adds of an average projected Gauss-Newton step, with coding and validation every so many
    steps.

    In a metric bases and forces are multiplied by L_i, and products by the matrix K_i that is made once a step.
    """
    n, p, d, m, r = sizes.n, sizes.p, sizes.d, sizes.m, sizes.r
    evaluate = n * (m * r * d + 2 * r * r * d + 3 * p * r * d + 2 * p * r * r + r**3)
    product = 3 * n * r * r * d + (4 if joint else 2) * n * m * r * d + _of_atoms(sizes)
    prepare = n * r * (2 * m * d + m * r + d * d) + n * m * r * _SKETCH * (d + r + m) + m * r**3 + d**3
    coding = n * m * r * d * (3 * r + m + 1)
    coded = 1 / coding_every if coding_every else 0.0
    if in_metric:
        evaluate += 2 * n * r * d * d
        product += n * r * d * (d - 2 * r)
        prepare += n * d * d * (r + d)
        coding += n * m * r * d * d
    return (
        (EVALUATIONS + 1 / evaluate_every + 2 * coded) * evaluate
        + cg_iterations * product
        + prepare
        + coded * coding
    )


def _of_atoms(sizes: Sizes) -> float:
    """Return what all atoms add to a conjugate-gradient iteration: the preconditioner, and halves of low-rank ones."""
    d, m, r, k = sizes.d, sizes.m, sizes.r, sizes.atom_rank
    if k is None:
        return m * r * d * (r + d)
    return m * (4 * r * k * d + r * k * (r + k) + k * d * (k + d))


def usual_iterations(train: TrainConfig) -> int:
    """Return the iterations of an average step: all, or with the truncation test what fits of 60 steps made."""
    return train.cg_iterations if train.cg_tolerance == 0 else min(train.cg_iterations, USUAL_ITERATIONS)


def average_work(config: Config, sizes: Sizes) -> float:
    """Return the multiply-adds of an average step as `config` asks for it."""
    return step_work(
        sizes,
        cg_iterations=usual_iterations(config.train),
        joint=config.codes.joint,
        coding_every=config.codes.every,
        evaluate_every=config.train.evaluate_every,
        in_metric=in_metric(config),
    )


def in_metric(config: Config) -> bool:
    """Return whether the kernels of a fit multiply by a metric of the columns."""
    match chosen_metric(config):
        case Metric.inputs:
            return config.family is not Family.down
        case Metric.experts:
            return not is_linear(config)
        case _:
            return False


def chunk_of(sizes: Sizes, *, itemsize: int) -> int:
    """Return experts that a conjugate-gradient product takes at once."""
    return product_chunk_size(sizes.n, sizes.r, sizes.d, sizes.m, itemsize=itemsize)


def reference_seconds(work: float) -> float:
    """Return the seconds of a step on the reference core: the same on every machine, as is what is planned by it."""
    return REFERENCE_OVERHEAD + work / REFERENCE_RATE


def fit_bytes(
    sizes: Sizes,
    *,
    itemsize: int,
    source_itemsize: int,
    curved: bool = True,
    joint: bool = True,
    members: int = 1,
    stored: bool = False,
    metric: int = 0,
    projected: bool = False,
) -> int:
    """Return the most that reading, fitting and exporting one bank hold at once, beside the program itself.

    Throughout: the normalised experts, or with `stored` those of the checkpoint. While reading: those of one member in
    the checkpoint's dtype too, and all twice where several members are joined. At a point: the adapters' Gram matrices
    and the orthonormal rows, slopes and forces of every expert; the bank as it is and as it was; at the first point the
    adapters too, at later ones two candidates of the bank, and a chunk's temporaries. In the conjugate gradients: the
    same without the forces, the moves, the inverses. Counted in the dtype of the fit: gradients in bfloat16 take less.
    In a metric: its `metric` numbers throughout, and with `projected`, in the conjugate gradients, a d x d matrix of
    every expert in the place of its orthonormal rows.
    """
    n, p, d, m, r = sizes.n, sizes.p, sizes.d, sizes.m, sizes.r
    k = sizes.atom_rank
    experts, bank = n * p * d, m * r * d
    reading = (1 + (members > 1)) * experts * itemsize
    reading += experts // members * source_itemsize if members == 1 else 0
    held = experts * itemsize
    if stored:
        held = experts * source_itemsize
        reading = (1 + (members > 1)) * held
    point = n * r * r + (3 if curved else 2) * n * r * d
    move = bank if k is None else m * k * (r + d)
    chunk = chunk_of(sizes, itemsize=itemsize)
    products = (2 if joint else 1) * bank + bank + 4 * move + 2 * chunk * r * d + chunk * r * r
    solver = 3 * m * r * r + (n * r * r if curved else 0) + 3 * d * d
    banks = 2 * bank + (0 if k is None else 2 * move)
    refits = chunk_size(n, max(r, p), d) * (4 * r * d + 2 * p * d + 3 * r * r)
    held += metric * itemsize
    if projected:
        products += n * d * (d - r)
    step = point + banks + max(products + solver - n * r * d, 2 * move + refits, n * p * r + refits)
    return max(reading + 3 * p * d * 8, held + step * itemsize)
