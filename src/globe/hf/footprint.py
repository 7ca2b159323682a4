"""Bytes that a model holds: dense weights, factors, composed bases. Exact: elements times their size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from globe.calibration.experts_module import experts_modules
from globe.hf.experts import GlobeExperts
from globe.hf.swap import SHARED_BANKS


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one model, without the allocator's rounding."""

    dense: int
    """expert matrices held dense: down everywhere, gate and up where they are not factored"""
    factors: int
    """adapters, codes, banks and stored means"""
    cache: int
    """bases that are composed now"""
    rest: int
    """everything that is not a routed expert: attention, embeddings, routers, shared experts"""

    @property
    def experts(self) -> int:
        return self.dense + self.factors + self.cache

    @property
    def total(self) -> int:
        return self.experts + self.rest


def footprint(model: nn.Module) -> Footprint:
    """Return what the model holds now; the cache grows with the experts that are hit, up to S_cache of them."""
    dense = factors = cache = 0
    for experts in experts_modules(model).values():
        module = model.get_submodule(experts)
        factored = isinstance(module, GlobeExperts)
        for name, parameter in module.named_parameters():
            if factored and name != "down_proj" and not name.endswith(".dense"):
                factors += parameter.nbytes
            else:
                dense += parameter.nbytes
        if isinstance(module, GlobeExperts):
            cache += sum(projection.composed_bytes for projection in module.projections.values())
    shared = getattr(model, SHARED_BANKS, None)
    factors += sum(one.nbytes for one in shared.parameters()) if shared is not None else 0
    whole = sum(one.nbytes for one in model.parameters())  # a tied tensor counts once
    return Footprint(dense, factors, cache, whole - dense - factors)
