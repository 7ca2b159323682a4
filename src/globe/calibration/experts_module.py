"""The experts modules of a transformers model, seen one expert at a time, however their weights are laid out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from globe.errors import CheckpointError


def experts_modules(model: nn.Module) -> dict[int, str]:
    """Return layer number -> dotted name of its experts module, regular or not.

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


class Routed(NamedTuple):
    """What one expert gets in a call: its inputs, and the gate values that weight its outputs."""

    expert: int
    x: Float[Tensor, "t d"]
    gate: Float[Tensor, " t"]


class ExpertsView:
    """One experts module: sizes, and what expert e computes on rows x, in float32.

    Raises CheckpointError for a module whose weights are neither the fused tensors that transformers 5 makes, nor those
    of DBRX, where the matrices of all experts stand one below the other.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module: Any = module
        self._stacked = _stacked(module)
        self._activation: Any = getattr(module, "act_fn", None)
        if self._stacked is not None:
            self.gated, self._transposed, self._interleaved = True, False, False
            self._activation = module.mlp.activation_fn  # type: ignore[union-attr]
            self.n, self.p, self.d = self._stacked["down"].shape
            return
        fused, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        self.gated = isinstance(fused, nn.Parameter)
        first = fused if self.gated else getattr(module, "up_proj", None)
        if not isinstance(first, nn.Parameter) or not isinstance(down, nn.Parameter) or first.dim() != 3:
            raise CheckpointError(
                f"{name} ({type(module).__name__}) has no fused gate_up_proj (or up_proj) and down_proj: "
                "calibrate can't read it, leave calibrate.text=null"
            )
        self._first, self._down = first, down
        # Llama 4 says nothing of its layout, and is the only one that multiplies from the left
        self._transposed = bool(getattr(module, "is_transposed", type(module).__name__.startswith("Llama4")))
        self._interleaved = not getattr(module, "is_concatenated", True)
        self.n = down.shape[0]
        self.p, self.d = (
            (down.shape[1], down.shape[2]) if self._transposed else (down.shape[2], down.shape[1])
        )

    def route(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Routed]:
        """Yield the experts that get tokens in a call of the module, in order."""
        x, *rest = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        if not rest:
            # Llama 4 gives every expert all tokens, multiplied by the gate beforehand and by 0 where not chosen
            for expert, rows in enumerate(x.reshape(self.n, -1, self.d)):
                chosen = rows[(rows != 0).any(1)].float()
                if chosen.shape[0]:
                    yield Routed(expert, chosen, chosen.new_ones(chosen.shape[0]))
            return
        index = next(one for one in rest if not one.is_floating_point())
        weights = next(one for one in rest if one.is_floating_point())
        yield from self._by_expert(x.reshape(-1, x.shape[-1]), index.flatten(0, -2), weights.flatten(0, -2))

    def _by_expert(
        self, x: Float[Tensor, "t d"], index: Int[Tensor, "t k"], weights: Float[Tensor, "t j"]
    ) -> Iterator[Routed]:
        if weights.shape != index.shape:
            weights = weights.gather(1, index)
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        # an index of n or more marks a pair of another device
        counts = torch.bincount(flat, minlength=self.n)[: self.n].tolist()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                pairs = order[start : start + count]
                yield Routed(expert, x[pairs // index.shape[1]].float(), weights.reshape(-1)[pairs].float())
            start += count

    def before_activation(self, expert: int, x: Float[Tensor, "t d"]) -> Float[Tensor, "t q"]:
        """Return gate x and up x as the module stores them: q = 2p, or p without a gate."""
        if self._stacked is not None:
            return torch.cat(
                [F.linear(x, self._stacked[family][expert].float()) for family in ("gate", "up")], -1
            )
        return self._linear(self._first, "gate_up_proj_bias" if self.gated else "up_proj_bias", expert, x)

    def activate(self, pre: Float[Tensor, "t q"]) -> Float[Tensor, "t p"]:
        """Return h, what goes into the down projection."""
        if not self.gated:
            return self._activation(pre)
        if hasattr(self._module, "_apply_gate"):
            return self._module._apply_gate(pre)
        gate, up = self.halves(pre)
        return self._activation(gate) * up

    def halves(self, pre: Float[Tensor, "t q"]) -> tuple[Float[Tensor, "t p"], Float[Tensor, "t p"]]:
        """Return the gate's and the up projection's part."""
        if self._interleaved:
            return pre[..., ::2], pre[..., 1::2]
        gate, up = pre.chunk(2, dim=-1)
        return gate, up

    def slopes(
        self, pre: Float[Tensor, "t q"]
    ) -> tuple[Float[Tensor, "t p"], Float[Tensor, "t p"], Float[Tensor, "t p"] | None]:
        """Return h and its derivatives by up x and by gate x (None without a gate), which are entrywise."""
        with torch.enable_grad():
            leaf = pre.detach().requires_grad_()
            h = self.activate(leaf)
            (slope,) = torch.autograd.grad(h.sum(), leaf)
        if not self.gated:
            return h.detach(), slope, None
        gate, up = self.halves(slope)
        return h.detach(), up, gate

    def output(self, expert: int, h: Float[Tensor, "t p"]) -> Float[Tensor, "t d"]:
        """Return what the expert gives, before its gate value weights it."""
        if self._stacked is not None:
            return h @ self._stacked["down"][expert].float()
        out = self._linear(self._down, "down_proj_bias", expert, h)
        return (
            self._module.post_expert_norm(out)
            if getattr(self._module, "has_post_expert_norm", False)
            else out
        )

    @contextmanager
    def replaced(self, family: str, weights: Float[Tensor, "n p d"]) -> Iterator[None]:
        """Let other matrices stand in for those of a family, as `Checkpoint.read_experts` gives them: all are p x d."""
        target = self._matrices(family)
        kept = target.clone()
        try:
            target.copy_(weights)
            yield
        finally:
            target.copy_(kept)

    def _matrices(self, family: str) -> Tensor:
        """Return the matrices of a family, each p x d: a view of the module's weights."""
        if self._stacked is not None:
            return self._stacked[family]
        if family == "down":
            return self._down.detach() if self._transposed else self._down.detach().mT
        weights = self._first.detach().mT if self._transposed else self._first.detach()
        if not self.gated:
            return weights
        if self._interleaved:
            return weights[:, int(family == "up") :: 2]
        return weights[:, self.p :] if family == "up" else weights[:, : self.p]

    def down_energies(self, F: Float[Tensor, "d d"] | None = None) -> Float[Tensor, "n p"]:
        """Return down_k^T F down_k of what unit k of each expert writes; ||down_k||^2 without F."""
        found = []
        for matrix in self._matrices("down"):
            rows = matrix.float()
            found.append((rows * (rows if F is None else rows @ F)).sum(1))
        return torch.stack(found)

    def _linear(self, weight: Tensor, bias: str, expert: int, x: Tensor) -> Tensor:
        matrix = weight[expert].detach().float()
        added = getattr(self._module, bias, None) if getattr(self._module, "has_bias", False) else None
        out = x @ matrix if self._transposed else F.linear(x, matrix)
        return out if added is None else out + added[expert].detach().float()


def _stacked(module: nn.Module) -> dict[str, Float[Tensor, "n p d"]] | None:
    """Return the matrices of a module in which those of all experts stand one below the other, as DBRX has them."""
    names = {"gate": "w1", "up": "v1", "down": "w2"}
    held = {family: getattr(getattr(module, "mlp", None), name, None) for family, name in names.items()}
    n = getattr(module, "num_experts", 0)
    if not n or not all(isinstance(one, nn.Parameter) and one.dim() == 2 for one in held.values()):
        return None
    return {family: one.detach().view(n, -1, one.shape[1]) for family, one in held.items() if one is not None}
