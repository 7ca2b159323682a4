"""Which modules of a model are experts the factored forward can replace."""

from __future__ import annotations

import re

from torch import nn

from globe.errors import CheckpointError


def experts_modules(model: nn.Module) -> dict[int, str]:
    """Layer number -> dotted name of its experts module, regular or not.

    Raises CheckpointError if a layer has more than one, or a name that tells no layer.
    """
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if not type(module).__name__.endswith("Experts") or not any(True for _ in module.parameters()):
            continue
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", name)
        if len(numbers) != 1 or int(numbers[0]) in found:
            raise CheckpointError(
                f"the experts module {name!r} of {type(model).__name__} can't be assigned to one layer: "
                "use format=dense, which works on the files alone"
            )
        found[int(numbers[0])] = name
    return found


def irregularity(module: nn.Module) -> str | None:
    """Why the factored forward can't replace an experts module; None if it can.

    Regular is what transformers 5 gives nearly every architecture: `gate_up_proj` (E, 2I, H) with the gate
    first, `down_proj` (E, H, I), no biases, called as (hidden states, top-k index, top-k weights).
    """
    fused, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if (
        not isinstance(fused, nn.Parameter)
        or not isinstance(down, nn.Parameter)
        or not hasattr(module, "act_fn")
    ):
        return "it has no gate_up_proj, down_proj and act_fn"
    expected = {
        "has_gate": (True, "it has no gate"),
        "has_bias": (False, "it has biases"),
        "is_transposed": (False, "it stores matrices transposed"),
        "is_concatenated": (True, "it interleaves gate and up"),
        "has_post_expert_norm": (False, "it normalises the output of every expert"),
    }
    for attribute, (value, reason) in expected.items():
        if getattr(module, attribute, None if attribute != "has_post_expert_norm" else False) is not value:
            return reason
    if fused.dim() != 3 or down.shape != (fused.shape[0], fused.shape[2], fused.shape[1] // 2):
        return f"its weights have the shapes {tuple(fused.shape)} and {tuple(down.shape)}"
    return None


def require_regular(module: nn.Module, name: str) -> None:
    """Raises CheckpointError, with the way out, if `irregularity` finds one."""
    reason = irregularity(module)
    if reason is not None:
        raise CheckpointError(
            f"{name} ({type(module).__name__}) can't run factored because {reason}: "
            "use format=dense, which works for every architecture"
        )
