"""What a bank is learned from, and whether an artefact or an unfinished fit is still of just that."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from globe.bank.file import BankArtefact, read_artefact
from globe.calibration.run import Calibration
from globe.checkpoint import Checkpoint
from globe.checkpoint.experts import SHARED, choose_experts
from globe.config.choices import Metric
from globe.config.composition import config_dict
from globe.config.identity import NUMERICS_VERSION, numerics
from globe.config.schema import Config, chosen_metric
from globe.fit.plan import BankPlan, Matrices, Outline, precision_of
from globe.runs.summary import BankReport

_log = logging.getLogger(__name__)
_BESIDE = ("calibration", "precision")
"""Entries of a bank's source, beside its experts, that decide its numbers"""


def experts_of(config: Config, checkpoint: Checkpoint, member: Matrices) -> tuple[int, ...]:
    """Return the routed expert number of each row that is read of a layer and family; -1 is the shared one."""
    n = checkpoint.shape(*member).n
    chosen = choose_experts(n, config.model.max_experts, str(config.model.sample_method))
    return (*chosen, SHARED) if config.model.include_shared else chosen


def source_of(
    config: Config, checkpoint: Checkpoint, bank: BankPlan | Outline, calibration: Calibration | None = None
) -> dict[str, Any]:
    """Return where a bank's experts come from, with hashes of their stored tensors and of the calibration.

    Bits that a budget chose stand here, since they depend on the other banks of the run; those typed are options.
    """
    names = {
        checkpoint.locate(*member, expert).tensor
        for member in bank.members
        for expert in experts_of(config, checkpoint, member)
    }
    source: dict[str, Any] = {**checkpoint.source(), "sha256": checkpoint.hash_tensors(sorted(names))}
    if calibration is not None and chosen_metric(config) is Metric.inputs:
        source["calibration"] = calibration.key
    if isinstance(bank, BankPlan) and bank.precision is not None and precision_of(config) is None:
        source["precision"] = asdict(bank.precision)
    return source


def bank_options(config: Config) -> dict[str, Any]:
    """Return the options that change a bank's numbers, whichever layers and families the run has besides.

    Where the checkpoint and the calibration text lie does not count: the hash of its tensors does, and the key of the
    calibration.
    """
    kept = numerics(config_dict(config))
    kept.pop("calibrate", None)
    model = {key: value for key, value in kept["model"].items() if key not in ("path", "revision")}
    rest = {key: value for key, value in kept.items() if key not in ("layer", "family", "model")}
    return rest | {"model": model, "numerics_version": NUMERICS_VERSION}


def fit_fingerprint(config: Config, bank: BankPlan, source: dict[str, Any], device: str) -> str:
    """Hash of all that decides a fit's numbers on a kind of device."""
    what = [bank_options(config), bank.key, asdict(bank.sizes), source["sha256"], device]
    what += [source[name] for name in _BESIDE if name in source]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def complete_artefact(
    folder: Path, config: Config, checkpoint: Checkpoint, bank: BankPlan, source: dict[str, Any]
) -> BankArtefact | None:
    """Return the artefact in `folder` if it is whole and is what this run would learn; None, with the reason logged."""
    if not folder.exists():
        return None
    try:
        artefact = read_artefact(folder)
        BankReport.from_dict(artefact.metrics or {})
    except ValueError as error:
        _log.warning("%s: the artefact there can't be used and is learned anew: %s", bank.key, error)
        return None
    members = [(member.layer, member.family, member.experts) for member in artefact.members]
    wanted = [(*member, experts_of(config, checkpoint, member)) for member in bank.members]
    sizes = (bank.sizes.m, bank.sizes.r, bank.sizes.atom_rank)
    same_sizes = (artefact.m, artefact.r, artefact.atom_rank) == sizes
    learned_from = artefact.source or {}
    same_experts = members == wanted and all(
        learned_from.get(name) == source.get(name) for name in ("sha256", *_BESIDE)
    )
    if not same_experts or not same_sizes or artefact.config != bank_options(config):
        _log.warning(
            "%s: the artefact there is of other experts, sizes or options and is learned anew", bank.key
        )
        return None
    return artefact


def stamp(path: str | None) -> str:
    """Return a cheap mark of a checkpoint folder's files (names, sizes, times, places); empty for what is not a folder.

    If it is unchanged the experts are; if it has changed, only their hash can tell. Among the times is the one of
    the last change of the file itself, which nobody can set back, as a copy that keeps times does with the other.
    """
    folder = None if path is None else Path(path).expanduser()
    if folder is None or not folder.is_dir():
        return ""
    files = sorted(one for one in folder.iterdir() if one.suffix in (".safetensors", ".json"))
    found = [(one.name, one.stat()) for one in files]
    facts = [(name, one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino) for name, one in found]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
