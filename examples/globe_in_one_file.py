"""The method of GloBE in one file, to be read from top to bottom: plain PyTorch, and nothing imported from globe.

    python examples/globe_in_one_file.py            # layer 12, up, of the model that comes with the package
    python examples/globe_in_one_file.py 3 gate     # another layer and family

The n experts of a layer are matrices W_i of p rows and d columns that do similar work. GloBE writes each of them as

    W_i  ~  A_i phi( sum_j alpha_ij B_j )                i = 1..n,  j = 1..m,  phi = SiLU

with m atoms B_j (r x d) that all experts share, a few codes alpha_ij >= 0 and one adapter A_i (p x r) per expert. It
finds them by minimising the sum of squared errors f(A, alpha, B), in six parts:

    1 normalise   2 start   3 refit the adapters   4 Gauss-Newton direction   5 take the step or not   6 export

The package adds what a large model needs (chunks of memory, low-rank atoms, sparse codes, several processes, files) and
no other idea. Names are those of docs/method.md. On layers of the embedded model the two agree to 0.5 % (a test).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

EMBEDDED = Path(__file__).parents[1] / "src" / "globe" / "embedded" / "globe-tiny" / "model.safetensors"

RIDGE = 1e-4  # lambda_A: relative ridge of the adapters, so that rounding the bank later costs little
START_SCALE = 0.25  # deviation of the first mixed bases: small, where SiLU is nearly linear
ONE_HOT, CONCENTRATION = 0.1, 2.0  # of the first codes
MOMENTUM = 0.95  # the most that a step is extrapolated
CG_ITERATIONS, CG_TOLERANCE = 40, 0.5
PRUNE = 1e-3  # codes below this share of an expert's largest become zero at the end


# --- 1. Normalise: X = (W - mean) / scale ----------------------------------------------------------------------------


def normalise(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract one number and divide by one number. Both are undone exactly: scale goes into A, the mean is stored."""
    mean = W.double().mean()
    scale = (W.double() - mean).square().mean().sqrt()
    return ((W.double() - mean) / scale).float(), mean.float(), scale.float()


# --- 2. Start: atoms from groups of experts, codes that are mixtures -------------------------------------------------


def right_basis(rows: Tensor, r: int) -> Tensor:
    """The r directions of the columns (r, d) that hold most of the energy of these rows: an SVD's right vectors."""
    _, vectors = torch.linalg.eigh(rows.double().T @ rows.double())
    return vectors.flip(1)[:, :r].T.float()


def start(X: Tensor, m: int, r: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bank B (m, r, d) and codes alpha (n, m)."""
    n = len(X)
    # one atom is the best basis of a random group of experts
    order, group = torch.randperm(n, generator=draw), torch.empty(n, dtype=torch.int64)
    group[order] = torch.arange(n) % m
    bank = torch.stack([right_basis(X[group == j].flatten(0, 1), r) for j in range(m)])
    # Bases are known up to a rotation of their rows, and mixtures of arbitrarily rotated ones cancel. So each atom is
    # turned to a basis of all atoms together: argmax over orthogonal Q of <Q B_j, joint> (Procrustes).
    joint = right_basis(bank.flatten(0, 1), r)
    U, _, V = torch.linalg.svd(joint @ bank.mT)
    bank = U @ V @ bank
    # One-hot codes are a saddle, since an atom off the support sees no gradient. Every expert starts as a mixture.
    seed = int(torch.randint(2**63 - 1, (1,), generator=draw))
    mixture = torch.from_numpy(
        np.random.Generator(np.random.PCG64(seed)).dirichlet(np.full(m, CONCENTRATION), n)
    )
    codes = torch.lerp(mixture.float(), torch.nn.functional.one_hot(group, m).float(), ONE_HOT)
    return bank * (START_SCALE / mix(codes, bank).square().mean().sqrt()), codes


# --- 3. Refit: with the bases given, the best adapters are linear least squares --------------------------------------


def mix(codes: Tensor, bank: Tensor) -> Tensor:
    """Mixed bases Y_i = sum_j alpha_ij B_j, shape (n, r, d)."""
    return torch.einsum("nm,mrd->nrd", codes, bank)


def phi(Y: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU and its derivative, entry by entry."""
    s = torch.sigmoid(Y)
    return Y * s, s * (1 + Y * (1 - s))


class Point(NamedTuple):
    """Bank and codes with their best adapters, and the first-order picture there."""

    bank: Tensor  # B (m, r, d)
    codes: Tensor  # alpha (n, m)
    adapters: Tensor  # A (n, p, r)
    rows: Tensor  # Q (n, r, d), orthonormal rows that span those of M_i = phi(Y_i)
    slope: Tensor  # J (n, r, d) = phi'(Y_i)
    force: Tensor  # J * A^T (X - A M): minus half the gradient of f with respect to Y_i
    error: float  # f


def mean_diagonal(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def refit(X: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """A_i = argmin ||X_i - A M_i||^2 + ridge ||A||^2 by Cholesky, M_i M_i^T + ridge I = L L^T and Q_i = L^-1 M_i."""
    S, eye = M @ M.mT, torch.eye(M.shape[1])
    L = torch.linalg.cholesky(S + RIDGE * mean_diagonal(S) * eye)
    inverse = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
    Q = inverse @ M
    return X @ Q.mT @ inverse, Q


def evaluate(X: Tensor, bank: Tensor, codes: Tensor) -> Point:
    M, J = phi(mix(codes, bank))
    A, Q = refit(X, M)
    residual = X - A @ M
    return Point(bank, codes, A, Q, J, J * (A.mT @ residual), float(residual.double().square().sum()))


# --- 4. The direction: a projected Gauss-Newton step -----------------------------------------------------------------
#
# The adapters follow every move of the bank, so the part of a move inside the row space of M_i costs nothing and is
# projected out (variable projection, Kaufman's form). To first order the residual R_i then becomes
#
#     R_i - A_i (J_i * dY_i) (I - Q_i^T Q_i),         dY_i = sum_j alpha_ij dB_j + dalpha_ij B_j,
#
# and the direction (dB, dalpha) minimises its square plus damping * ||.||^2. The normal equations H d = g are solved
# by conjugate gradients, where H is never formed: a product with it is four batched matrix products.

Move = tuple[Tensor, Tensor]  # of the bank and of the codes


class Tangent(NamedTuple):
    """The linear map (R dB, dalpha) -> dY at a point, and its adjoint; codes = C R, whose columns couple atoms less."""

    point: Point
    C: Tensor
    R: Tensor

    def change(self, move: Move) -> Tensor:
        return mix(self.C, move[0]) + mix(move[1], self.point.bank)

    def adjoint(self, force: Tensor) -> Move:
        return torch.einsum("nm,nrd->mrd", self.C, force), torch.einsum("nrd,mrd->nm", force, self.point.bank)


def curvature(at: Tangent, gram: Tensor, damping: Move, move: Move) -> Move:
    """H move = dY^T [ J * G ((J * dY) (I - Q^T Q)) ] + damping * move with G_i = A_i^T A_i."""
    J, Q = at.point.slope, at.point.rows
    Z = J * at.change(move)
    dB, dcodes = at.adjoint(J * (gram @ (Z - (Z @ Q.mT) @ Q)))
    return dB + damping[0] * move[0], dcodes + damping[1] * move[1]


class Preconditioner(NamedTuple):
    """Inverses of blocks of H: r x r for each atom times one d x d for the columns, m x m for each expert's codes."""

    atoms: Tensor
    columns: Tensor
    codes: Tensor
    damping: Move  # of Levenberg and Marquardt, in the units of the blocks

    def __call__(self, move: Move) -> Move:
        return self.atoms @ move[0] @ self.columns, (self.codes @ move[1][:, :, None])[:, :, 0]


def precondition(at: Tangent, gram: Tensor, damping: float) -> Preconditioner:
    Q, bank, eye = at.point.rows, at.point.bank, torch.eye
    weights = gram * at.point.slope.square().mean((1, 2))[:, None, None]
    atoms = torch.einsum("nm,nrs->mrs", at.C**2, weights)
    typical = mean_diagonal(atoms).mean()
    # directions that every adapter can absorb have no curvature; 0.1 keeps the inverse bounded there
    columns = 1.1 * eye(Q.shape[2]) - (Q.mT @ Q).mean(0)
    outside = bank[None] - torch.einsum("mrd,nsd,nse->nmre", bank, Q, Q)
    codes = torch.einsum("njrd,nrs,nlsd->njl", outside, weights, outside)
    own, ridge = 1e-3 * mean_diagonal(codes), damping * mean_diagonal(codes).mean()
    return Preconditioner(
        inverse(atoms + damping * typical * eye(atoms.shape[1])),
        inverse(columns),
        inverse(codes + (own + ridge) * eye(codes.shape[1])),
        (damping * typical, ridge),
    )


def inverse(blocks: Tensor) -> Tensor:
    """Invert symmetric positive blocks, with the ridge that rounding asks for."""
    ridge = 1e-6 * mean_diagonal(blocks) * torch.eye(blocks.shape[-1])
    return torch.cholesky_inverse(torch.linalg.cholesky(blocks + ridge))


def dot(a: Move, b: Move) -> float:
    return float((a[0] * b[0]).sum() + (a[1] * b[1]).sum())


def add(a: Move, length: float, b: Move) -> Move:
    return a[0] + length * b[0], a[1] + length * b[1]


def direction(point: Point, damping: float) -> Move:
    """Preconditioned conjugate gradients from zero; a few iterations far from a minimum, more near it (Nash, Sofer)."""
    at, gram = Tangent(point, *torch.linalg.qr(point.codes)), point.adapters.mT @ point.adapters
    solve = precondition(at, gram, damping)
    residual, step = at.adjoint(point.force), (torch.zeros_like(point.bank), torch.zeros_like(point.codes))
    search = solve(residual)
    energy, fallen = dot(residual, search), 0.0
    for count in range(1, CG_ITERATIONS + 1):
        curved = curvature(at, gram, solve.damping, search)
        if (bend := dot(search, curved)) <= 0:
            break
        gain = energy**2 / bend
        fallen += gain
        step, residual = add(step, energy / bend, search), add(residual, -energy / bend, curved)
        if count * gain <= CG_TOLERANCE * fallen:
            break
        solved = solve(residual)
        energy, before = dot(residual, solved), energy
        search = add(solved, energy / before, search)
    dB = torch.linalg.solve_triangular(at.R, step[0].flatten(1), upper=True).view_as(point.bank)
    return dB, step[1]


# --- 5. The fit: a step is taken only if the error falls -------------------------------------------------------------


def feasible(codes: Tensor, before: Tensor) -> Tensor:
    """Codes are not negative, and never all zero for an expert."""
    codes = codes.clamp_min(0)
    return torch.where(codes.sum(1, keepdim=True) > 0, codes, before)


def fit(W: Tensor, m: int, r: int, steps: int, seed: int = 0, log: bool = False) -> Point:
    X, *_ = normalise(W)
    draw = torch.Generator().manual_seed(seed)
    torch.randint(2**31, (1,), generator=draw)  # the package draws a seed for its steps here
    point = evaluate(X, *start(X, m, r, draw))
    total = float(X.double().square().sum())
    anchor, run, damping = (point.bank, point.codes), 0, 1e-2
    for count in range(1, steps + 1):
        dB, dcodes = direction(point, damping)
        plain = point.bank + dB, feasible(point.codes + dcodes, point.codes)
        # first extrapolated along the way since the last step (Nesterov), then as it is
        weight = min(MOMENTUM, (run + 1) / (run + 4))
        beyond = add(plain, weight, add(plain, -1, anchor))
        further = evaluate(X, beyond[0], feasible(beyond[1], plain[1]))
        if further.error < point.error:
            point, anchor, run, taken = further, plain, run + 1, True
        else:
            nearer = evaluate(X, *plain)
            taken = nearer.error < point.error
            point, run = nearer if taken else point, 0
            anchor = point.bank, point.codes
        # less damping after a step that was taken, down to a share of the error, and much more after one that was not
        damping = max(1e-6, 0.1 * point.error / total, damping / 2.5) if taken else min(1e5, 5 * damping)
        if log and count % 10 == 0:
            print(f"step {count:3d}   RelFrob {(point.error / total) ** 0.5:.4f}")
    return point


# --- 6. Export: prune, round, refit to what was rounded, fold the scale in, measure ----------------------------------


class Exported(NamedTuple):
    bank: Tensor
    codes: Tensor
    adapters: Tensor
    mean: Tensor

    def rebuild(self) -> Tensor:
        """The experts (n, p, d) from nothing but what is stored."""
        return self.adapters.float() @ phi(mix(self.codes.float(), self.bank.float()))[0] + self.mean


def export(W: Tensor, point: Point, dtype: torch.dtype = torch.bfloat16) -> tuple[Exported, float]:
    """What is stored, and its RelFrob."""
    X, mean, scale = normalise(W)
    codes = torch.where(point.codes < PRUNE * point.codes.amax(1, keepdim=True), 0, point.codes).to(dtype)
    bank = point.bank.to(dtype)
    adapters, _ = refit(X, phi(mix(codes.float(), bank.float()))[0])  # makes good what the rounding spoilt
    stored = Exported(bank, codes, (scale * adapters).to(dtype), mean)
    return stored, float((W.float() - stored.rebuild()).norm() / (W.float() - mean).norm())


def main(layer: int = 12, family: str = "up") -> None:
    torch.set_num_threads(1)  # such small products are not worth a second one
    with safe_open(EMBEDDED, framework="pt") as file:
        names = [f"model.layers.{layer}.mlp.experts.{i}.{family}_proj.weight" for i in range(16)]
        W = torch.stack([file.get_tensor(name) for name in names])
    bank, relfrob = export(W, fit(W, m=len(W) // 4, r=W.shape[1] // 2, steps=60, log=True))
    kept = sum(part.numel() for part in bank) / W.numel()
    print(f"experts of the shape {tuple(W.shape)}: {kept:.1%} of the numbers kept, RelFrob {relfrob:.4f}")


if __name__ == "__main__":
    main(*(int(word) if word.isdigit() else word for word in sys.argv[1:3]))
