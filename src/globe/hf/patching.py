"""Compress a model that is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from globe.bank.compose import rebuild
from globe.bank.file import BankArtefact
from globe.calibration.experts_module import experts_modules
from globe.checkpoint.architecture import FAMILIES, Slot, load_architecture
from globe.checkpoint.experts import SHARED
from globe.checkpoint.location import locate_matrix
from globe.errors import ArtefactError
from globe.hf.experts import GlobeExperts
from globe.hf.layout import unpacked
from globe.hf.run_banks import BankEntry, open_run, recorded_cache
from globe.hf.swap import SHARED_BANKS, bank_values, check_fit, fill, member_values, swap_in


def patch_model(
    model: Any,
    run: str | Path,
    *,
    S_cache: int | str | None = None,
    dtype: torch.dtype | None = None,
    dense: bool = False,
) -> Any:
    """Put the banks of a run folder into a transformers model, in place, and return it.

    The experts that a bank serves become factored: W_e = A_e M_e + mean (for down the transpose of W_e), in `dtype`
    (None: the model's own) on the device of the weights they replace. `S_cache` is the number of experts whose
    bases stay composed per layer and family: 0 composes at each call, "all" keeps every one, None is what the run says.
    With `dense` the reconstructions are written into the dense weights instead. `save_pretrained` then writes a
    compact checkpoint (with `dense`, an ordinary one).

    The weights of a model in memory can't be compared with those a bank was learned from; its architecture
    and sizes are. Raises ArtefactError or CheckpointError if a bank does not fit, or the experts can't run
    factored; then the model is unchanged.
    """
    entries = open_run(run)
    made_for = {str(entry.source.get("model_type")) for entry in entries}
    if made_for != {model.config.model_type}:
        raise ArtefactError(
            f"run={str(run)!r} was learned from a {' and a '.join(sorted(made_for))}, and the model is a "
            f"{model.config.model_type}: give the model it was learned from"
        )
    if any(isinstance(module, GlobeExperts) for module in model.modules()):
        raise ArtefactError("the model is compressed already: load the original, or dequantize() it first")
    names = experts_modules(model)
    check_fit(model, names, [entry.layout for entry in entries])
    if dense:
        for entry in entries:
            _write_dense(model, names, entry)
        return model
    cache = recorded_cache(run) if S_cache is None else S_cache
    return _swap(model, entries, S_cache=cache, dtype=dtype)


@torch.no_grad()
def _write_dense(model: nn.Module, names: dict[int, str], entry: BankEntry) -> None:
    artefact = entry.read()
    for member in entry.members:
        target = dense_view(model.get_submodule(names[member.layer]), member.family)
        for row, expert in enumerate(member.experts, start=member.start):
            if expert != SHARED:
                target[expert] = rebuild(artefact, [row], dtype=target.dtype)[0]
    _write_shared(model, artefact)


def dense_view(module: nn.Module, family: str) -> Float[Tensor, "n p d"]:
    """Return the weights of one family of a regular experts module, down transposed: a view that can be written to."""
    if family == "down":
        down = module.down_proj
        assert isinstance(down, nn.Parameter)
        return down.detach().mT
    fused = module.gate_up_proj
    assert isinstance(fused, nn.Parameter)
    return fused.detach().chunk(2, dim=1)[family == "up"]


@torch.no_grad()
def _write_shared(model: nn.Module, artefact: BankArtefact) -> None:
    """Put the always-on shared expert, where a bank has it, into its own dense weights."""
    for member in artefact.members:
        if SHARED not in member.experts:
            continue
        name, weight, slot = _shared_weight(model, member.layer, member.family)
        row = member.start + member.experts.index(SHARED)
        matrix = locate_matrix(slot, name, tuple(weight.shape), None).view(weight)
        matrix.copy_(rebuild(artefact, [row], dtype=weight.dtype)[0])


def _shared_weight(model: Any, layer: int, family: str) -> tuple[str, Tensor, Slot]:
    architecture = load_architecture(model.config.model_type)
    slot = architecture.shared.slot(family) if architecture.shared is not None else None
    name = slot.name(layer, 0) if slot is not None else "a shared expert"
    parameters = dict(model.named_parameters())
    if slot is None or name not in parameters:
        raise ArtefactError(
            f"the bank of layer {layer} {family} has the shared expert, but the model lacks {name}"
        )
    return name, parameters[name], slot


@torch.no_grad()
def _swap(
    model: Any, entries: tuple[BankEntry, ...], *, S_cache: int | str, dtype: torch.dtype | None
) -> Any:
    from globe.hf.quantizer import attach, check_cache

    check_cache(S_cache)
    layouts = unpacked([entry.layout for entry in entries])
    touched = {member.layer for layout in layouts for member in layout.members}
    names = experts_modules(model)
    fused = {
        layer: {family: dense_view(model.get_submodule(names[layer]), family) for family in FAMILIES}
        for layer in touched
    }
    swap_in(model, layouts)
    place = {layer: (held["up"].device, dtype or held["up"].dtype) for layer, held in fused.items()}
    for layer in touched:
        experts = model.get_submodule(names[layer])
        assert isinstance(experts, GlobeExperts)
        held = fused.pop(layer)
        for family, projection in experts.projections.items():
            if projection.dense_row:
                fill(projection, {"dense": held[family][sorted(projection.dense_row)]}, *place[layer])
    for index, entry in enumerate(entries):
        artefact = entry.read()
        for position, member in enumerate(entry.members):
            experts = model.get_submodule(names[member.layer])
            projection = experts.projections[member.family]
            fill(projection, member_values(artefact, position), *place[member.layer])
        bank = getattr(model, SHARED_BANKS)[f"bank{index}"] if entry.layout.shared else projection.bank
        fill(bank, bank_values(artefact), *place[entry.members[0].layer])
        _write_shared(model, artefact)
    attach(model, layouts, S_cache)
    return model
