"""A learned bank as a Python user holds it: its figures, its reconstructions, its file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import Sizes
from globe.bank.compose import rebuild
from globe.bank.file import BankArtefact, read_artefact, write_artefact
from globe.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Bank:
    """A bank of m atoms that stands for n experts: W_i ~ A_i phi(sum_j alpha_ij B_j) + mean.

    `globe.fit` makes it and `globe.load_bank` reads it. The tensors are those of `artefact`: `codes` (n, m),
    `adapters` (n, p, r), and `bank` (m, r, d) or `atoms_left` (m, r, k) and `atoms_right` (m, k, d).
    """

    artefact: BankArtefact

    @property
    def sizes(self) -> Sizes:
        """Numbers n, p, d, m, r, and `atom_rank` (k) and `target_support` where the bank has them."""
        one, support = self.artefact, (self.artefact.metrics or {}).get("target_support")
        return Sizes(one.n, one.p, one.d, one.m, one.r, target_support=support, atom_rank=one.atom_rank)

    @property
    def kept(self) -> float:
        """Share of the experts' n p d numbers that adapters, atoms, codes and stored means keep, 0 to 1."""
        metrics = self.artefact.metrics or {}
        return (
            int(metrics.get("kept_parameters", self.artefact.kept_parameters))
            / self.artefact.family_parameters
        )

    @property
    def relfrob(self) -> float:
        """RelFrob of the stored factors, sqrt(sum ||W_i - What_i||^2 / sum ||W_i - mean||^2); 0 is exact.

        Raises ConfigError for a bank that was written without its figures.
        """
        metrics = self.artefact.metrics or {}
        if "relfrob" not in metrics:
            raise ConfigError("this bank was written without figures: compare reconstruct() with the experts")
        return float(metrics["relfrob"])

    def reconstruct(
        self, experts: Sequence[int] | None = None, *, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "chosen p d"]:
        """Rebuild dense experts.

        Parameters
        ----------
        experts
            Numbers of the experts, counted from 0 through all of the bank's; None is all n.
        dtype
            Dtype of the result; None is that of the factors. Computed in float32 or wider.

        Returns
        -------
        The matrices (len(experts), p, d), in the order asked for, in the units of the original weights.

        Raises
        ------
        ConfigError
            If a number is not from 0 to n - 1.
        """
        if experts is not None and not all(0 <= expert < self.artefact.n for expert in experts):
            raise ConfigError(
                f"experts={list(experts)} is not possible: give numbers from 0 to {self.artefact.n - 1}"
            )
        return rebuild(self.artefact, experts, dtype=dtype)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the bank as `bank.safetensors` and `globe.json`; the folder appears whole or not at all.

        An earlier bank in the folder is replaced. Raises ArtefactError if the folder holds anything else.
        """
        write_artefact(self.artefact, folder)

    def __repr__(self) -> str:
        one = self.artefact
        rank = "" if one.atom_rank is None else f", k={one.atom_rank}"
        error = (one.metrics or {}).get("relfrob")
        return (
            f"Bank(n={one.n}, p={one.p}, d={one.d}, m={one.m}, r={one.r}{rank}, kept={self.kept:.4f}"
            f"{'' if error is None else f', relfrob={error:.4f}'})"
        )


def load_bank(folder: str | os.PathLike[str]) -> Bank:
    """Read a bank that `Bank.save` or a run of `globe.train` wrote (`banks/KEY/`); its hash is checked.

    Raises ArtefactError when a file is missing, damaged, foreign or of another format version.

    >>> import globe
    >>> bank = globe.fit(globe.extract_expert_weights("embedded", single_layer=3)["up"], m=4, r=24, steps=3)
    >>> bank.save("my-bank")
    >>> globe.load_bank("my-bank").sizes.m
    4
    """
    return Bank(read_artefact(folder))
