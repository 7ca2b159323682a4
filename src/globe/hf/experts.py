"""The experts module of a layer with factored projections: a drop-in for transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from globe.hf.atoms import Atoms
from globe.hf.layout import BankLayout, MemberLayout
from globe.hf.products import Routing, grouped
from globe.hf.projection import OutputProjection, Projection


class GlobeExperts(nn.Module):
    """sum over the top-k experts e of w_e down_e (act(gate_e x) * up_e x), any of the three factored.

    Takes the place of a regular experts module (`globe.hf.structure`), is called as it is, and gives what it
    would give with the dense products in its weights. A dense `down_proj` keeps its name and so its upstream
    name in files. `served` gives, for "gate", "up" and "down", the layout of the bank and the member that this
    layer is of it, and the bank itself if it is shared with others; a family that is absent stays dense.
    """

    globe_gate: Projection
    globe_up: Projection
    globe_down: OutputProjection
    down_proj: nn.Parameter

    def __init__(
        self, dense: nn.Module, served: dict[str, tuple[BankLayout, MemberLayout, Atoms | None]]
    ) -> None:
        super().__init__()
        fused, down = dense.gate_up_proj, dense.down_proj
        assert isinstance(fused, nn.Parameter)
        assert isinstance(down, nn.Parameter)
        experts, double, hidden = fused.shape
        self.num_experts = experts
        self.size = (double // 2, hidden)
        self.families = ("gate", "up", "down") if "down" in served else ("gate", "up")
        if "down" not in served:
            self.down_proj = down
        for family in self.families:
            layout, member, bank = served.get(family, (None, None, None))
            kind = OutputProjection if family == "down" else Projection
            projection = kind(experts, self.size, layout, member, bank=bank, dtype=fused.dtype)
            self.add_module(f"globe_{family}", projection)
        # What is left of the dense module knows the activation, and becomes it again in `densify`. A tuple
        # hides it from the module tree: it has no weights any more.
        dense.gate_up_proj = dense.down_proj = None  # type: ignore[assignment]
        self._dense = (dense,)
        gating = getattr(type(dense), "_apply_gate", None)
        self._plain = gating is None or gating.__name__ == "_default_apply_gate"

    @property
    def projections(self) -> dict[str, Projection]:
        return {family: getattr(self, f"globe_{family}") for family in self.families}

    def forward(
        self,
        hidden_states: Float[Tensor, "t d"],
        top_k_index: Int[Tensor, "t k"],
        top_k_weights: Float[Tensor, "t k"],
    ) -> Float[Tensor, "t d"]:
        """Return the sum over the experts of each token. Token-expert pairs are sorted by expert; only experts that
        got a token are touched.

        An index of `num_experts` or more, with which expert parallelism marks pairs of other devices, adds
        nothing. The sum over the k experts of a token is taken in the precision of the weighted outputs.
        """
        flat = top_k_index.reshape(-1).clamp(max=self.num_experts)
        experts, order = torch.sort(flat, stable=True)
        ends = torch.searchsorted(experts, torch.arange(self.num_experts, device=flat.device), right=True)
        routing = Routing(order // top_k_index.shape[1], experts, ends)
        pairs = hidden_states[routing.tokens]
        gate = self.globe_gate(hidden_states, pairs, routing)
        up = self.globe_up(hidden_states, pairs, routing)
        inner = self._activate(gate, up)
        if "down" in self.families:
            outputs = self.globe_down(inner, inner, routing)
        else:
            outputs = grouped(inner, self.down_proj, ends, range(self.num_experts))
        weighted = outputs * top_k_weights.reshape(-1)[order, None]
        # back to one row per pair, then a sum over k: deterministic, unlike adding rows by index on a GPU
        back = torch.empty_like(weighted).index_copy_(0, order, weighted)
        return back.view(*top_k_index.shape, back.shape[1]).sum(1).to(hidden_states.dtype)

    def _activate(self, gate: Float[Tensor, "s p"], up: Float[Tensor, "s p"]) -> Float[Tensor, "s p"]:
        """Apply the dense module's own gating, which in some architectures is more than a product."""
        dense: Any = self._dense[0]
        if self._plain:
            return dense.act_fn(gate) * up
        return dense._apply_gate(torch.cat([gate, up], dim=-1))

    @torch.no_grad()
    def densify(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the dense module again, with the products of the factors in its weights (gate first)."""
        example = next(self.parameters())
        dense, dtype = self._dense[0], dtype or example.dtype
        trained = example.requires_grad
        fused = torch.cat([self.globe_gate.rebuild(), self.globe_up.rebuild()], dim=1)
        down = (
            self.globe_down.rebuild().mT.contiguous() if "down" in self.families else self.down_proj.detach()
        )
        dense.gate_up_proj = nn.Parameter(fused.to(dtype), requires_grad=trained)
        dense.down_proj = nn.Parameter(down.to(dtype), requires_grad=trained)
        return dense
