"""Bytes of a bank's file and what a checkpoint saves by it, from sizes alone; streams of coded integers are counted at
their most."""

from __future__ import annotations

from dataclasses import replace

from globe.checkpoint import Checkpoint
from globe.config.choices import WEIGHT_METHODS, ExportDtype, Scale
from globe.config.schema import Config
from globe.fit.plan import BankPlan
from globe.fit.reading import DTYPES


def saved_bytes(config: Config, checkpoint: Checkpoint, bank: BankPlan) -> int:
    """Return the bytes by which this bank's factors are smaller than dense experts; shared experts stay dense."""
    sizes, shared = bank.sizes, len(bank.members) * config.model.include_shared
    held = sizes.parameters - shared * (sizes.p * sizes.r + sizes.m) + bank.mean_parameters
    dense = (sizes.n - shared) * sizes.p * sizes.d
    itemsize = checkpoint.dtype(*bank.members[0]).itemsize
    if bank.precision is not None:
        factors = factor_bytes(config, bank, itemsize) * (sizes.n - shared) // sizes.n
        return dense * itemsize - factors - bank.mean_parameters * itemsize
    return (dense - held) * itemsize


def factor_bytes(config: Config, bank: BankPlan, itemsize: int) -> int:
    """Return the bytes of the factors in a file: packed where they have few bits, numbers of `itemsize` elsewhere."""
    sizes, precision = bank.sizes, bank.precision
    if precision is None:
        return sizes.parameters * itemsize
    m = sizes.m
    if config.method in WEIGHT_METHODS:  # no atoms, and groups of 64 unless bits differ by row
        m = 0
        if config.bank.size is None:
            precision = replace(precision, group_adapters=precision.group_adapters or 64)
    return -(-precision.bits(sizes.n, sizes.p, sizes.d, m, sizes.r, sizes.atom_rank) // 8)


def file_bytes(config: Config, checkpoint: Checkpoint, bank: BankPlan) -> int:
    """Return the bytes of a bank's artefact without its header: factors in the export dtype, means and scales."""
    sizes, fit = bank.sizes, DTYPES[config.dtype].itemsize
    exported = checkpoint.dtype(*bank.members[0])
    if config.export_dtype is not ExportDtype.auto:
        exported = DTYPES[config.export_dtype]
    scales = {Scale.none: 0, Scale.row: sizes.n * sizes.p}.get(config.normalise.scale, sizes.n)
    matrices = bank.mean_parameters > len(bank.members)
    mean = bank.mean_parameters * (exported.itemsize if matrices else fit)
    return factor_bytes(config, bank, exported.itemsize) + mean + scales * fit
