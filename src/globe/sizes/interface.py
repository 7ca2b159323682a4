"""`globe.fit`: one bank from experts in memory, by the code of `python -m globe.train`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from globe.am.records import StepRecord
from globe.bank.learned import Bank, load_bank
from globe.checkpoint import Checkpoint
from globe.checkpoint.in_memory import ExpertsInMemory
from globe.config.choices import Scope
from globe.config.commands import explain
from globe.config.composition import config_dict
from globe.config.keywords import configure
from globe.config.schema import Config
from globe.errors import CheckpointError, ConfigError
from globe.fit.calibrated import calibration_for
from globe.fit.one_bank import Run, learn_bank
from globe.fit.plan import outline
from globe.numerics.device import arithmetic, limit_threads
from globe.runs.folder import RunFolder
from globe.runs.progress import Progress
from globe.runs.tracking import Fanout
from globe.sizes.banks import sized_banks
from globe.sizes.model_size import with_model_size
from globe.sizes.sizing import Sizing


class Keywords(TypedDict, total=False):
    """What `globe.fit` and `globe.compress` take besides the arguments they name."""

    method: str
    """globe, or a method it is measured against: svd, shared_basis, mean_svd, group_svd, mobe, mobe_corrected, slbf"""
    support: int | str
    """median number of atoms an expert may use at the end (`codes.target_support`)"""
    device: str | torch.device
    """auto, cpu, cuda or mps"""
    dtype: str | torch.dtype
    """arithmetic of the fit: float32 or float64"""
    export_dtype: str | torch.dtype
    """dtype of the factors; auto is that of the experts"""
    progress: bool
    """show a bar on a terminal, and the table of a search for sizes"""
    overrides: Sequence[str]
    """any other option, as `python -m globe.train` takes it: ["train.patience=0", "init=kmeans"]"""


_KEYS = {
    "metric": "normalise.metric",
    "activation": "bank.activation",
    "steps": "train.steps",
    "support": "codes.target_support",
    "kept": "bank.kept",
    "m": "bank.m",
    "r": "bank.r",
    "k": "bank.atom_rank",
}
"""Names of arguments that the configuration calls otherwise."""


def fit(
    experts: Tensor | Sequence[Tensor],
    *,
    kept: float | None = None,
    m: int | str | None = None,
    r: int | str | None = None,
    k: int | str | None = None,
    metric: str | None = None,
    activation: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    **options: Unpack[Keywords],
) -> Bank:
    """Learn one bank for experts W_i: min sum_i ||W_i - A_i phi(sum_j alpha_ij B_j) - mean||_F^2.

    Parameters
    ----------
    experts      a tensor (n, p, d), a list of n matrices (p, d), or a list of tensors (n_g, p, d), whose groups share
                 the bank and are each normalised by themselves; not changed
    kept         share of the n p d numbers to keep at most, 0 to 1; sizes are then chosen by short fits
    m, r, k      sizes instead: atoms, rows of an atom, and the rank of low-rank atoms (None: dense). Integers, or
                 expressions such as "n/4" and "p/2", which are what m and r are where neither they nor `kept` is given
    metric, activation, steps
                 as the options `normalise.metric`, `bank.activation` and `train.steps` of `python -m globe.train`;
                 None is what that takes by default
    seed         decides every random draw; equal seeds give equal banks on the same machine
    options      see `Keywords`

    Returns
    -------
    The bank, with its tensors on the CPU in the dtype of the experts.

    Raises
    ------
    ConfigError for an argument that is not possible; CheckpointError for experts without a common shape, without a
    floating-point dtype, or with numbers that are not finite; FitError when the fit breaks down twice or memory runs
    out.

    >>> import globe
    >>> experts = globe.extract_expert_weights("embedded", single_layer=12)["up"]
    >>> bank = globe.fit(experts, m=4, r=24, steps=20)
    >>> bank
    Bank(n=16, p=48, d=64, m=4, r=24, kept=0.5013, relfrob=0.35...)
    >>> bank.reconstruct([3, 7]).shape
    torch.Size([2, 48, 64])
    """
    groups = _groups(experts)
    given = {"kept": kept, "m": m, "r": r, "k": k, "metric": metric, "activation": activation, "steps": steps}
    joined = {"bank.scope": "layers"} if len(groups) > 1 else {}
    config = config_of(given | {"seed": seed, "family": "up", "layer": "all"}, options, joined)
    if len(groups) == 1 and config.bank.scope is not Scope.family:
        raise ConfigError(
            f"bank.scope={config.bank.scope} is for models: give a list of tensors (n, p, d) to share a bank"
        )
    source = ExpertsInMemory(
        {(layer, "up"): group for layer, group in enumerate(groups)}, model_type="tensors"
    )
    with tempfile.TemporaryDirectory(prefix="globe-") as scratch:
        (folder,) = learn_banks(config, source, RunFolder(scratch), progress=options.get("progress", False))
        return load_bank(folder)


def config_of(given: dict[str, Any], options: Keywords, fixed: dict[str, Any]) -> Config:
    """Return the configuration of keyword arguments; `fixed` is by the names of the configuration."""
    unknown = sorted(set(options) - set(Keywords.__annotations__))
    if unknown:
        known = [*(name for name in given if name not in ("family", "layer")), *Keywords.__annotations__]
        raise ConfigError(f"{unknown[0]} is not an argument: give one of {', '.join(known)}")
    named: dict[str, Any] = dict(options)
    words = [f"method={named.pop('method')}"] if "method" in named else []
    words += named.pop("overrides", ())
    named.pop("progress", None)
    for name in ("device", "dtype", "export_dtype"):
        if name in named:
            named[name] = str(named[name]).removeprefix("torch.")
    values = {_KEYS.get(key, key): one for key, one in (given | named).items()}
    return configure(values | fixed, words)


def learn_banks(
    config: Config, checkpoint: Checkpoint, folder: RunFolder, *, progress: bool = False
) -> tuple[Path, ...]:
    """Learn every bank that `config` asks for into a run folder, and return the folders of the banks.

    Banks that are there already are taken, and unfinished fits go on. Raises what `fit` raises, and OSError
    when results can't be written.
    """
    with folder.held(), folder.recorded(explain), arithmetic(config) as device:
        folder.begin(config_dict(config))
        outlines = outline(config, checkpoint)
        config = with_model_size(config, checkpoint, outlines)
        limit_threads(config, max(bank.n * bank.p * bank.d for bank in outlines))
        calibration = calibration_for(config, checkpoint, outlines, device)
        sizing = Sizing(checkpoint, device, calibration, quiet=not progress)
        banks = sized_banks(config, outlines, sizing, folder)
        with Progress(len(banks), config.train.steps, Fanout([])) if progress else nullcontext() as bar:
            on_step = _silent if bar is None else bar.step
            run = Run(config, checkpoint, folder, device, on_step, calibration=calibration)
            for bank in banks:
                if bar is not None:
                    bar.begin(bank.key)
                learn_bank(run, bank)
                if bar is not None:
                    bar.end()
    return tuple(folder.bank(bank.key) for bank in banks)


def _silent(key: str, record: StepRecord) -> None:
    """Do nothing, since nobody looks."""


def _groups(experts: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the members of the bank, each (n, p, d)."""
    if isinstance(experts, Tensor):
        return [experts]
    tensors = list(experts)
    if not tensors or not all(isinstance(one, Tensor) for one in tensors):
        raise CheckpointError(
            "experts is not a tensor (n, p, d) or a list of at least one tensor: give one of both"
        )
    shapes = {tuple(one.shape[-2:]) for one in tensors}
    axes = {one.dim() for one in tensors}
    if len(shapes) > 1 or len(axes) > 1 or axes.isdisjoint({2, 3}):
        raise CheckpointError(
            f"experts of the shapes {sorted({tuple(one.shape) for one in tensors})} can't share a bank: give matrices "
            "of one shape (p, d), or tensors (n, p, d) with one p and d"
        )
    if len({one.dtype for one in tensors}) > 1:
        raise CheckpointError("the experts have different dtypes: convert them to one")
    return tensors if axes == {3} else [torch.stack(tensors)]
