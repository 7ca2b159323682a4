"""What the processes beside the first do: their experts' part of every fit that it orders."""

from __future__ import annotations

import math

import torch

from globe.checkpoint import open_checkpoint
from globe.config.schema import Config
from globe.errors import FitError
from globe.fit.figures import expert_spectra, expert_spread
from globe.fit.one_bank import fit_globe
from globe.fit.plan import plan
from globe.fit.reading import read_experts
from globe.numerics.device import arithmetic, give_back_memory, spare_threads
from globe.processes.torchrun import Group


def follow(config: Config, group: Group) -> None:
    """Take part until rank 0 says that the run is done. Reads this rank's experts, writes nothing."""
    order = group.hear()
    if order is None:
        return
    with arithmetic(config):
        # opened after rank 0 did, so that a hub's files are downloaded once
        checkpoint = open_checkpoint(config.model.path, revision=config.model.revision)
        banks = {bank.key: bank for bank in plan(config, checkpoint)}
        spare_threads(config, max(math.prod(bank.outline.shape) for bank in banks.values()))
        while order is not None:
            bank = banks[order.key]
            ranks = group.ranks(bank.sizes.n)
            give_back_memory()
            read = read_experts(config, checkpoint, bank.outline, group.device, ranks)
            try:
                fit_globe(
                    config,
                    bank,
                    read,
                    torch.Generator().manual_seed(order.seed),
                    order.state,
                    ranks,
                    on_step=lambda record: None,
                    on_checkpoint=lambda state: None,
                )
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise FitError(
                    f"{bank.key} does not fit into the memory of a rank: start more of them"
                ) from error
            expert_spectra(read.joined.experts, ranks)
            expert_spread(read.joined.experts, ranks)
            del read
            order = group.hear()
