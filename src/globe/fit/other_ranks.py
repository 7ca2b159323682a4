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
from globe.numerics.device import arithmetic, limit_threads, trim_heap
from globe.processes.torchrun import Group


def follow(config: Config, torchrun: Group) -> None:
    """Take part until process 0 says that the run is done. Reads this process's experts, writes nothing."""
    order = torchrun.hear()
    if order is None:
        return
    with arithmetic(config):
        # opened after process 0 did, so that a hub's files are downloaded once
        checkpoint = open_checkpoint(config.model.path, revision=config.model.revision)
        banks = {bank.key: bank for bank in plan(config, checkpoint)}
        limit_threads(config, max(math.prod(bank.outline.shape) for bank in banks.values()))
        while order is not None:
            bank = banks[order.key]
            group = torchrun.share(bank.sizes.n)
            trim_heap()
            read = read_experts(config, checkpoint, bank.outline, torchrun.device, group)
            try:
                fit_globe(
                    config,
                    bank,
                    read,
                    torch.Generator().manual_seed(order.seed),
                    order.state,
                    group,
                    on_step=lambda record: None,
                    on_checkpoint=lambda state: None,
                )
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise FitError(
                    f"{bank.key} does not fit into the memory of a rank: start more of them"
                ) from error
            expert_spectra(read.joined.experts, group)
            expert_spread(read.joined.experts, group)
            del read
            order = torchrun.hear()
