"""A look at a checkpoint right after it was written: it loads, its experts are those of the banks, and it writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from globe.calibration.experts_module import experts_modules
from globe.errors import CheckpointError, GlobeError
from globe.hf.experts import GlobeExperts
from globe.hf.loading import load
from globe.hf.run_banks import BankEntry, DenseExperts
from globe.hf.structure import irregularity

_LOOKED_AT = 4
_NEW_TOKENS = 10
_PROMPT = 8
_SHARE_OF_MEMORY = 0.4
"""Checkpoints of at most this share of the machine's memory are looked at without being asked to."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True, slots=True)
class Sanity:
    """What was seen; `sentence` says it."""

    experts: int
    """experts compared with the factors; 0 where the architecture keeps them otherwise"""
    difference: float
    """largest relative difference of one of them"""
    tokens: tuple[int, ...]
    """what the model went on with"""

    @property
    def sentence(self) -> str:
        compared = (
            f"{self.experts} experts are those of the banks (largest relative difference {self.difference:.0e}), "
            if self.experts
            else ""
        )
        return f"it loads in transformers, {compared}its logits are finite, and it generates {len(self.tokens)} tokens"


def fits_in_memory(folder: Path) -> bool:
    """Return whether a checkpoint is small enough to be loaded as a matter of course."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return False
    return stored <= _SHARE_OF_MEMORY * memory


@torch.no_grad()
def look(folder: str | Path, entries: tuple[BankEntry, ...]) -> Sanity:
    """Load the checkpoint, compare a few experts with the factors, run it once and let it generate.

    Raises CheckpointError where one of these fails.
    """
    try:
        model = load(folder, dtype="auto")
        experts, difference = _compare(model, entries)
        prompt = torch.arange(1, _PROMPT + 1)[None] % int(model.config.get_text_config().vocab_size)
        logits = model(input_ids=prompt, use_cache=False).logits
        new = model.generate(prompt, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False)
    except GlobeError:
        raise
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{str(folder)!r} is written, but transformers can't run it ({error}): give check=false to keep it unseen"
        ) from error
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError(
            f"{str(folder)!r} is written, but its logits are not finite: train the run again"
        )
    return Sanity(experts, difference, tuple(new[0, prompt.shape[1] :].tolist()))


def _compare(model: Any, entries: tuple[BankEntry, ...]) -> tuple[int, float]:
    names = experts_modules(model)
    dense = DenseExperts()
    places = [
        (entry, position, row, expert)
        for entry in entries
        for position, member in enumerate(entry.members)
        for row, expert in enumerate(member.experts)
        if expert >= 0
    ]
    chosen = [places[at * len(places) // _LOOKED_AT] for at in range(min(_LOOKED_AT, len(places)))]
    worst, compared = 0.0, 0
    for entry, position, row, expert in chosen:
        member = entry.members[position]
        module = model.get_submodule(names[member.layer]) if member.layer in names else None
        held = None if module is None else _held(module, member.family, expert)
        if held is None:
            continue
        wanted = dense(entry, position, row, torch.float32).to(held.device)
        difference = float((held.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))
        worst, compared = max(worst, difference), compared + 1
        if difference > _TOLERANCE.get(held.dtype, 4e-2):
            raise CheckpointError(
                f"layer {member.layer} {member.family}, expert {expert} of the written checkpoint is {difference:.0e} "
                "from what the bank stands for: patch again, and if that stays, report it"
            )
    return compared, worst


def _held(module: Any, family: str, expert: int) -> Tensor | None:
    """Return one matrix (p, d) of a loaded experts module; None where its architecture keeps it otherwise."""
    if isinstance(module, GlobeExperts):
        projection = module.projections[family]
        return projection.rebuild()[expert] if projection.row else None
    if irregularity(module) is not None:
        return None
    if family == "down":
        return module.down_proj[expert].mT
    return module.gate_up_proj[expert].chunk(2)[family == "up"]
