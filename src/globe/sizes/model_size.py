"""`model.size`: a budget for the files of the whole compressed model, as the share of bytes that is left for banks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from globe.checkpoint import Checkpoint
from globe.checkpoint.in_memory import ExpertsInMemory
from globe.config.bank_options import bytes_of_text
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.fit.plan import Outline

_ENTRY = 80
"""Bytes of a tensor in a file's header beside its name, at most."""
_TENSORS, _NAME = 10, 64
"""Tensors that a bank adds for each of its members, at most, and bytes of their names."""


def with_model_size(config: Config, checkpoint: Checkpoint, banks: Sequence[Outline]) -> Config:
    """Return the configuration with the `bank.size` that `model.size` leaves, if it is given.

    All that is no expert of the run's layers and families stays as it is read, and counts first. Raises ConfigError
    where it takes all there is, and for experts without files.
    """
    size = config.model.size
    if size is None:
        return config
    if isinstance(checkpoint, ExpertsInMemory):
        raise ConfigError(
            f"model.size={size} counts the files of a model: give bank.size for experts without any"
        )
    experts, weights, gone = 0, 0, set[str]()
    for bank in banks:
        for member, count in zip(bank.members, bank.counts, strict=True):
            routed = count - config.model.include_shared
            experts += routed * bank.p * bank.d * checkpoint.dtype(*member).itemsize
            weights += count * bank.p * bank.d
            gone |= {checkpoint.locate(*member, expert).tensor for expert in range(routed)}
    left = [name for name in checkpoint.reader.names if name not in gone]
    headers = sum(len(name) + _ENTRY for name in left)
    headers += sum(len(bank.members) for bank in banks) * _TENSORS * (_ENTRY + _NAME)
    rest = checkpoint.plain_bytes - experts + headers
    share = (bytes_of_text(size) - rest) / (2 * weights)
    if share <= 0:
        raise ConfigError(
            f"model.size={size} is less than the {rest / 1e6:,.1f} MB of all that is not compressed: give a larger size"
        )
    return replace(
        config, model=replace(config.model, size=None), bank=replace(config.bank, size=min(1.0, share))
    )
