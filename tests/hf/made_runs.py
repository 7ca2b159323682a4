"""Runs made by hand from random factors, and what they stand for, multiplied out the slow obvious way.

Sizes differ from each other and from those of `tiny_models`: p = 20, d = 24, n = 6; m = 4, r = 13, atom rank 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from globe.bank.file import BankArtefact, Member, write_artefact
from globe.checkpoint import Checkpoint, open_checkpoint

ATOMS = 4
RANK = 13
ATOM_RANK = 3
Place = tuple[int, str]


def random_bank(
    checkpoint: Checkpoint,
    places: Sequence[Place],
    *,
    experts: Sequence[int] | None = None,
    mean: str = "none",
    activation: str = "silu",
    lam: float = 0.6,
    low_rank: bool = False,
    m: int = ATOMS,
    r: int = RANK,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> BankArtefact:
    """A bank of random factors for the `experts` (None: all routed ones) of the places, about as large as they."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    shape = checkpoint.shape(*places[0])
    chosen = tuple(range(shape.n)) if experts is None else tuple(experts)
    n = len(chosen) * len(places)
    codes = torch.rand(n, m, generator=generator)
    codes[codes < 0.3] = 0.0
    atoms = (
        {
            "atoms_left": draw(m, r, ATOM_RANK, scale=0.5),
            "atoms_right": draw(m, ATOM_RANK, shape.d, scale=0.5),
        }
        if low_rank
        else {"bank": draw(m, r, shape.d, scale=0.4)}
    )
    means = {
        "none": None,
        "scalar": draw(len(places), scale=0.05),
        "matrix": draw(len(places), shape.p, shape.d, scale=0.05),
    }
    return BankArtefact(
        members=members_of(places, chosen),
        codes=codes.to(dtype),
        adapters=draw(n, shape.p, r, scale=0.1),
        activation=activation,
        lam=lam,
        mean=means[mean],
        source=source_of(checkpoint, places, chosen),
        config={},
        seed=seed,
        metrics={},
        **atoms,
    )


def lossless_bank(checkpoint: Checkpoint, place: Place, *, gain: float = 1.0) -> BankArtefact:
    """m = n, r = min(p, d) = p: one-hot codes, the experts themselves as atoms, identities as adapters."""
    weights = checkpoint.read_experts(*place).weights
    n, p, _ = weights.shape
    chosen = tuple(range(n))
    return BankArtefact(
        members=members_of([place], chosen),
        codes=torch.eye(n, dtype=weights.dtype),
        adapters=gain * torch.eye(p, dtype=weights.dtype).repeat(n, 1, 1),
        bank=weights,
        activation="identity",
        lam=0.0,
        source=source_of(checkpoint, [place], chosen),
        config={},
        metrics={},
    )


def members_of(places: Sequence[Place], experts: tuple[int, ...]) -> tuple[Member, ...]:
    count = len(experts)
    return tuple(
        Member(layer, family, index * count, (index + 1) * count, experts)
        for index, (layer, family) in enumerate(places)
    )


def source_of(checkpoint: Checkpoint, places: Sequence[Place], experts: Sequence[int]) -> dict[str, Any]:
    names = {checkpoint.locate(*place, expert).tensor for place in places for expert in experts}
    return {**checkpoint.source(), "sha256": checkpoint.hash_tensors(names)}


def write_run(folder: Path, banks: Sequence[BankArtefact]) -> Path:
    """A run folder as globe.train leaves it, as far as patching reads it."""
    for bank in banks:
        key = "+".join(f"layer{one.layer:03d}.{one.family}" for one in bank.members)
        write_artefact(bank, folder / "banks" / key)
    return folder


def random_run(source: Path, folder: Path, families: Sequence[str] = ("up", "gate"), **options: Any) -> Path:
    """One bank for each family of each MoE layer, all different."""
    checkpoint = open_checkpoint(str(source))
    places = [(layer, family) for layer in checkpoint.moe_layers for family in families]
    banks = [
        random_bank(checkpoint, [place], seed=seed, **options) for seed, place in enumerate(places, start=1)
    ]
    return write_run(folder, banks)


def dense_experts(bank: BankArtefact) -> dict[tuple[int, str, int], Tensor]:
    """(layer, family, expert) -> W in float64, one sum at a time."""
    found = {}
    for position, member in enumerate(bank.members):
        for row, expert in enumerate(member.experts, start=member.start):
            Y = torch.zeros(bank.r, bank.d, dtype=torch.float64)
            for j in range(bank.m):
                if bank.bank is not None:
                    atom = bank.bank[j].double()
                else:
                    atom = bank.atoms_left[j].double() @ bank.atoms_right[j].double()
                Y += bank.codes[row, j].double() * atom
            M = (1 - bank.lam) * Y + bank.lam * act(Y, bank.activation)
            W = bank.adapters[row].double() @ M
            if bank.mean is not None:
                W = W + bank.mean[position].double()
            found[member.layer, member.family, expert] = W
    return found


def act(Y: Tensor, activation: str) -> Tensor:
    match activation:
        case "identity":
            return Y
        case "silu":
            return Y / (1 + torch.exp(-Y))
        case "tanh":
            return (torch.exp(Y) - torch.exp(-Y)) / (torch.exp(Y) + torch.exp(-Y))
        case "gelu":
            return 0.5 * Y * (1 + torch.erf(Y / math.sqrt(2)))
    raise AssertionError(activation)


@torch.no_grad()
def put_dense(model: nn.Module, experts: dict[tuple[int, str, int], Tensor]) -> None:
    """Write matrices into the weights of a model in memory, in whatever way its architecture keeps them."""
    modules = {}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            (layer,) = (int(part) for part in name.split(".") if part.isdigit())
            modules[layer] = module
    for (layer, family, expert), matrix in experts.items():
        module, W = modules[layer], matrix
        p = W.shape[0]
        if type(module).__name__ == "DbrxExperts":  # the (p, d) matrices of all experts, one below the other
            stacked = {"gate": "w1", "up": "v1", "down": "w2"}[family]
            getattr(module.mlp, stacked)[expert * p : (expert + 1) * p] = W.float()
        elif family == "down":  # a bank holds it transposed
            stored_transposed = type(module).__name__ in ("GptOssExperts", "Llama4TextExperts")
            module.down_proj[expert] = (W if stored_transposed else W.T).float()
        elif type(module).__name__ == "GptOssExperts":
            module.gate_up_proj[expert, :, (0 if family == "gate" else 1) :: 2] = W.T.float()
        elif type(module).__name__ == "Llama4TextExperts":
            half = slice(0, p) if family == "gate" else slice(p, None)
            module.gate_up_proj[expert, :, half] = W.T.float()
        elif type(module).__name__ == "NemotronHExperts":
            assert family == "up"
            module.up_proj[expert] = W.float()
        else:
            module.gate_up_proj[expert, (slice(0, p) if family == "gate" else slice(p, None))] = W.float()
