"""What ranks of a sharded fit exchange, and how far its result is from that of one rank.

    python experiments/bench/sharded.py                  # two processes on this machine
    python experiments/bench/sharded.py --ranks 4

Every exchange of `globe.numerics.group.ProcessGroup` is counted by its numbers, once however many ranks take part.
Random experts;
two directions at one point, of 3 and of 13 iterations, differ by ten iterations and nothing else. Then fits of the
embedded model's layer 12, up, with default options, by the ranks and by the first of them alone; and by that one again
with its sums over experts in chunks of four, which is what rounding does to a fit without any ranks.

Exit code 1 when an iteration takes more than the atoms' move, m r d numbers or m k (r + d) with low-rank atoms, and two
scalars, or when a RelFrob in float64 is further than 1e-5 from that of one rank.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.tangent import tangent
from globe.am.loop import fit_bank
from globe.am.options import Start
from globe.am.records import FitResult, Sizes, StepOptions
from globe.am.start import first_atoms
from globe.am.state import start_state
from globe.am.step import am_step
from globe.checkpoint import open_checkpoint
from globe.config.choices import Activation, CurvatureDtype
from globe.config.schema import BankConfig, Config, TrainConfig
from globe.fit.normalise import normalise
from globe.fit.options import fit_options
from globe.numerics import chunks
from globe.numerics.group import ALONE, ProcessGroup

SIZES = (
    Sizes(12, 20, 32, 3, 10),
    Sizes(16, 44, 64, 4, 22),
    Sizes(24, 40, 56, 24, 20, atom_rank=4),
    Sizes(60, 88, 128, 15, 44),
)
SCALARS = 2
FITS = (
    ("identity", None, torch.float64, "same"),
    ("identity", None, torch.float32, "same"),
    ("silu", None, torch.float64, "same"),
    ("silu", None, torch.float32, "same"),
    ("silu", 5, torch.float64, "same"),
    ("silu", 5, torch.float32, "same"),
    ("silu", None, torch.float32, "bfloat16"),
)
"""Activation, rank of the atoms, dtype of the fit and of its curvature products."""
STEPS = 30
NEAR = 1e-5


class Counted(ProcessGroup):
    """Counts the numbers of every exchange."""

    numbers = 0

    def _add(self, tensor: Tensor) -> None:
        Counted.numbers += tensor.numel()
        super()._add(tensor)

    def _send(self, tensor: Tensor, source: int) -> None:
        Counted.numbers += tensor.numel()
        super()._send(tensor, source)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    return parser.parse_args()


def counted(call: Callable[[], object]) -> int:
    before = Counted.numbers
    call()
    return Counted.numbers - before


def measure(sizes: Sizes) -> tuple[int, float, int]:
    """Numbers that the start takes, one iteration, and a step of 10 iterations beside these."""
    group = Counted.of(sizes.n, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    X = group.own(torch.randn(sizes.n, sizes.p, sizes.d, generator=draw))
    before = Counted.numbers
    atoms = first_atoms(X, sizes, Start(), generator=draw, warm=None, group=group)
    start = Counted.numbers - before
    state = start_state(X, atoms, StepOptions("silu", lambda_A=1e-4), group=group)
    slopes = tangent(atoms.bank, atoms.codes, left=atoms.left, right=atoms.right, group=group)

    def direction(iterations: int) -> Callable[[], object]:
        sketch = torch.Generator().manual_seed(1)
        return lambda: gauss_newton_direction(
            slopes, state.point, cg_iterations=iterations, damping=1e-2, generator=sketch
        )

    few, many = counted(direction(3)), counted(direction(13))
    step = counted(
        lambda: am_step(
            X,
            state,
            StepOptions(activation="silu", lambda_A=1e-4),
            generator=torch.Generator().manual_seed(1),
            group=group,
        )
    )
    return start, (many - few) / 10, round(step - (many - few))


def fitted(
    group: ProcessGroup, activation: str, atom_rank: int | None, dtype: torch.dtype, products: str
) -> FitResult:
    experts = open_checkpoint(None).read_experts(12, "up").weights
    n, p, d = experts.shape
    X = normalise(group.own(experts), centre="scalar", scale="family", dtype=dtype, group=group).experts
    config = Config(
        bank=BankConfig(activation=Activation(activation)),
        train=TrainConfig(steps=STEPS, patience=0, curvature_dtype=CurvatureDtype(products)),
    )
    sizes = Sizes(n, p, d, n // 4 if atom_rank is None else n, p // 2, atom_rank=atom_rank)
    return fit_bank(X, sizes, fit_options(config), generator=torch.Generator().manual_seed(0), group=group)


def compare(leads: bool) -> bool:
    """Fits by all ranks beside the same by the first alone; whether those in float64 are near enough."""
    near = True
    if leads:
        print(
            "| activation | k | dtype | products | RelFrob, one rank | all ranks | its bank | in chunks | its bank |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
    for activation, k, dtype, products in FITS:
        options = (activation, k, dtype, products)
        together = fitted(ProcessGroup.of(16, torch.device("cpu")), *options)
        if not leads:
            continue
        alone = fitted(ALONE, *options)
        whole, chunks.CHUNK_NUMBERS = chunks.CHUNK_NUMBERS, 1
        parted = fitted(ALONE, *options)
        chunks.CHUNK_NUMBERS = whole
        gaps = [apart(one, alone) for one in (together, parted)]
        near &= gaps[0][0] <= NEAR or dtype != torch.float64
        name = str(dtype).removeprefix("torch.")
        row = (activation, k or "-", name, products, f"{alone.relfrob:.6f}")
        print(
            "| " + " | ".join(map(str, (*row, *(f"{gap:.0e}" for gap in sum(gaps, ()))))) + " |", flush=True
        )
    return near


def apart(one: FitResult, other: FitResult) -> tuple[float, float]:
    """How far two fits are from each other: RelFrob, and the largest entry of the bank's difference, relative."""
    bank = other.factors.bank
    return abs(one.relfrob - other.relfrob), float((one.factors.bank - bank).abs().max() / bank.abs().max())


def count(leads: bool) -> bool:
    """Numbers exchanged at several sizes; whether an iteration takes no more than it should."""
    passed = True
    if leads:
        print(f"{dist.get_world_size()} ranks; numbers that are added up or sent, at each place")
        print("|  n |  p |   d |  m |  r |  k |  m r d | per iteration | step besides |  start |")
        print("|---|---|---|---|---|---|---|---|---|---|")
    for sizes in SIZES:
        start, iteration, step = measure(sizes)
        n, p, d, m, r, k = sizes.n, sizes.p, sizes.d, sizes.m, sizes.r, sizes.atom_rank
        passed &= iteration <= (m * r * d if k is None else m * k * (r + d)) + SCALARS
        if leads:
            row = (n, p, d, m, r, k or "-", m * r * d, f"{iteration:g}", step, start)
            print("| " + " | ".join(str(one) for one in row) + " |")
    return passed


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    leads = dist.get_rank() == 0
    passed = count(leads)
    passed &= compare(leads)
    if leads:
        print("PASS" if passed else "FAIL")
    dist.barrier()
    dist.destroy_process_group()
    return 0 if passed else 1


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(main())
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments().ranks}"]
    sys.exit(subprocess.run([sys.executable, *launch, str(Path(__file__).resolve())], check=False).returncode)
