"""Which modules of a model are experts the factored forward can replace."""

from __future__ import annotations

from torch import nn

from globe.errors import CheckpointError


def irregularity(module: nn.Module) -> str | None:
    """Return why the factored forward can't replace an experts module; None if it can.

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
    """Raise CheckpointError, with the way out, if `irregularity` finds one."""
    reason = irregularity(module)
    if reason is not None:
        raise CheckpointError(
            f"{name} ({type(module).__name__}) can't run factored because {reason}: "
            "use format=dense, which works for every architecture"
        )
