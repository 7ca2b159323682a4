"""What ranks of a sharded fit exchange: numbers per conjugate-gradient iteration beside m r d, and per step.

    python experiments/bench/sharded.py                  # two processes on this machine
    python experiments/bench/sharded.py --ranks 4

Every exchange of `globe.am.ranks.Sharded` is counted by its numbers, once however many ranks take part. Random experts;
two directions at one point, of 3 and of 13 iterations, differ by ten iterations and nothing else. Exit code 1 when an
iteration takes more than the atoms' move, m r d numbers or m k (r + d) with low-rank atoms, and two scalars.
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

from globe.am.gauss_newton import gauss_newton_direction
from globe.am.ranks import Sharded
from globe.am.records import Sizes
from globe.am.start import first_atoms
from globe.am.state import start_state
from globe.am.step import am_step
from globe.am.tangent import tangent
from globe.config import InitConfig

SIZES = (
    Sizes(12, 20, 32, 3, 10),
    Sizes(16, 44, 64, 4, 22),
    Sizes(24, 40, 56, 24, 20, atom_rank=4),
    Sizes(60, 88, 128, 15, 44),
)
SCALARS = 2


class Counted(Sharded):
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
    ranks = Counted.of(sizes.n, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    X = ranks.own(torch.randn(sizes.n, sizes.p, sizes.d, generator=draw))
    before = Counted.numbers
    atoms = first_atoms(X, sizes, InitConfig(), generator=draw, warm=None, ranks=ranks)
    start = Counted.numbers - before
    state = start_state(X, atoms, lam=1.0, activation="silu", lambda_A=1e-4, ranks=ranks)
    slopes = tangent(atoms.bank, atoms.codes, left=atoms.left, right=atoms.right, ranks=ranks)

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
            lam=1.0,
            beta=1.0,
            temperature=1.0,
            activation="silu",
            generator=torch.Generator().manual_seed(1),
            cg_iterations=10,
            lambda_A=1e-4,
            ranks=ranks,
        )
    )
    return start, (many - few) / 10, round(step - (many - few))


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    leads, passed = dist.get_rank() == 0, True
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
    if leads:
        print("PASS" if passed else "FAIL")
    dist.destroy_process_group()
    return 0 if passed else 1


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(main())
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments().ranks}"]
    sys.exit(subprocess.run([sys.executable, *launch, str(Path(__file__).resolve())], check=False).returncode)
