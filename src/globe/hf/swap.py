"""Replace a model's experts modules by factored ones, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from globe.bank.file import BankArtefact
from globe.calibration.experts_module import experts_modules
from globe.checkpoint.architecture import FAMILIES
from globe.errors import ArtefactError
from globe.hf.atoms import Atoms
from globe.hf.experts import GlobeExperts
from globe.hf.layout import BankLayout, MemberLayout
from globe.hf.structure import require_regular

SHARED_BANKS = "globe_banks"
"""Where banks that serve several layers or families stand at the root of the model."""


def swap_in(model: nn.Module, layouts: Sequence[BankLayout]) -> dict[int, str]:
    """Put a `GlobeExperts` without values (on the meta device) in place of every layer that a bank serves.

    Returns layer -> name of its module. Raises ArtefactError if a layout does not fit the model, and
    CheckpointError if the experts of a layer can't run factored; then nothing has been changed.
    """
    names = experts_modules(model)
    check_fit(model, names, layouts)
    dtype = next(model.parameters()).dtype
    with torch.device("meta"):
        banks = {index: Atoms(layout, dtype) for index, layout in enumerate(layouts) if layout.shared}
        served: dict[int, dict[str, tuple[BankLayout, MemberLayout, Atoms | None]]] = {}
        for index, layout in enumerate(layouts):
            for member in layout.members:
                served.setdefault(member.layer, {})[member.family] = (layout, member, banks.get(index))
        for layer, families in served.items():
            replace_module(model, names[layer], GlobeExperts(model.get_submodule(names[layer]), families))
    if banks:
        model.add_module(SHARED_BANKS, nn.ModuleDict({f"bank{index}": bank for index, bank in banks.items()}))
    return {layer: names[layer] for layer in served}


def swap_out(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put dense experts with the products of the factors back in place of every `GlobeExperts`."""
    for name in [name for name, module in model.named_modules() if isinstance(module, GlobeExperts)]:
        module = model.get_submodule(name)
        assert isinstance(module, GlobeExperts)
        replace_module(model, name, module.densify(dtype))
    if hasattr(model, SHARED_BANKS):
        delattr(model, SHARED_BANKS)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent).add_module(leaf, module)


def check_fit(model: nn.Module, names: Mapping[int, str], layouts: Sequence[BankLayout]) -> None:
    """Raise ArtefactError or CheckpointError, with one sentence, if the banks are not of this model."""
    seen: set[tuple[int, str]] = set()
    for layout in layouts:
        for member in layout.members:
            what = f"the bank of layer {member.layer} {member.family}"
            if (member.layer, member.family) in seen:
                raise ArtefactError(f"{what} is there twice: keep one of the two in the run folder")
            seen.add((member.layer, member.family))
            if member.family not in FAMILIES:
                raise ArtefactError(f"{what} can't run factored: use format=dense")
            if member.layer not in names:
                raise ArtefactError(
                    f"{what} does not fit {type(model).__name__}, which has experts in the layers "
                    f"{sorted(names)}: give the model it was trained on"
                )
            module = model.get_submodule(names[member.layer])
            require_regular(module, names[member.layer])
            experts, double, hidden = module.gate_up_proj.shape  # type: ignore[misc]
            if (layout.p, layout.d) != (double // 2, hidden) or max(member.experts, default=0) >= experts:
                raise ArtefactError(
                    f"{what} is for experts of {layout.p} x {layout.d} and {type(model).__name__} has {experts} "
                    f"of {double // 2} x {hidden}: give the model it was trained on"
                )


def bank_values(artefact: BankArtefact) -> dict[str, Tensor]:
    """Return the parameters of `Atoms`, by name."""
    if artefact.bank is not None:
        return {"atoms": artefact.bank}
    assert artefact.atoms_left is not None
    assert artefact.atoms_right is not None
    return {"left": artefact.atoms_left, "right": artefact.atoms_right}


def routed_rows(artefact: BankArtefact, position: int) -> list[int]:
    """Return the rows of the routed experts of a member; the shared expert, if the bank has it, stays dense."""
    member = artefact.members[position]
    return [member.start + row for row, expert in enumerate(member.experts) if expert >= 0]


def member_values(artefact: BankArtefact, position: int) -> dict[str, Tensor]:
    """Return the parameters of a `Projection` that come from the bank's member at `position`, by name."""
    rows = routed_rows(artefact, position)
    values = {"adapters": artefact.adapters[rows], "codes": artefact.codes[rows]}
    if artefact.mean is not None:
        only = slice(position, position + 1) if artefact.mean.dim() == 1 else position
        values["mean"] = artefact.mean[only]
    return values


def fill(module: nn.Module, values: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Give parameters of a module without values theirs, copied to `device` and `dtype`."""
    for name, value in values.items():
        parameter = nn.Parameter(value.detach().to(device, dtype, copy=True))
        assert parameter.shape == module.get_parameter(name).shape
        module.register_parameter(name, parameter)
