"""GloBE as a quantisation method of vLLM: what it is asked while a model is built, loaded and run."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, library
from transformers import CONFIG_MAPPING, PreTrainedConfig
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

from globe_vllm import PREFIX
from globe_vllm.factors import Bank, Factors
from globe_vllm.loading import PLACES, SHARED

VERSION_KEY = "globe_version"
READABLE_VERSIONS = (1, 2)
FORMS = ("bank", "composed")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def compact_config_class(model_type: str) -> type:
    """The class by which transformers reads the `config.json` of one compact model type."""

    def from_dict(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        upstream = str(config_dict["model_type"]).removeprefix(PREFIX)
        described = {**config_dict.get("quantization_config", {}), "quant_method": "globe"}
        known = {**config_dict, "model_type": upstream, "quantization_config": described}
        return CONFIG_MAPPING[upstream].from_dict(known, **kwargs)

    return type(
        model_type, (PreTrainedConfig,), {"model_type": model_type, "from_dict": classmethod(from_dict)}
    )


def register_method() -> None:
    """Add the method to vLLM's own."""
    if "globe" not in QUANTIZATION_METHODS:
        register_quantization_config("globe")(GlobeConfig)


class GlobeConfig(QuantizationConfig):
    """The banks of a compact checkpoint, and which form of them stays in memory."""

    def __init__(self, banks: list[dict[str, Any]], form: str) -> None:
        super().__init__()
        self.banks, self.form = banks, form

    def get_name(self) -> str:
        return "globe"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: Any, hf_config: Any = None
    ) -> str | None:
        """Claim compact checkpoints.

        vLLM puts the raw record of `config.json` back over the one transformers made, and that names no `quant_method`:
        unclaimed, the model would run on experts that no file filled.
        """
        return "globe" if VERSION_KEY in hf_quant_cfg else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GlobeConfig:
        """Raises ValueError for a checkpoint of another format, or a form that does not exist."""
        version = config.get(VERSION_KEY)
        if version not in READABLE_VERSIONS:
            raise ValueError(
                f"globe: the checkpoint has {VERSION_KEY}={version!r} and this globe-vllm reads "
                f"{', '.join(map(str, READABLE_VERSIONS))}: update globe-vllm, or patch with packed=false"
            )
        # a checkpoint says how many bases stay composed; a layer of vLLM keeps all of them or none
        form = os.environ.get("GLOBE_VLLM_FORM") or ("bank" if config.get("S_cache") == 0 else "composed")
        if form not in FORMS:
            raise ValueError(f"globe: GLOBE_VLLM_FORM={form!r} is not possible: choose {' or '.join(FORMS)}")
        return cls(config["banks"], form)

    def served(self, layer: int) -> dict[str, tuple[int, dict[str, Any], dict[str, Any]]]:
        """Family -> number of the bank, the bank and the member, for one layer."""
        return {
            member["family"]: (number, bank, member)
            for number, bank in enumerate(self.banks)
            for member in bank["members"]
            if member["layer"] == layer
        }

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            number = extract_layer_index(prefix)
            served = self.served(number)
            return GlobeMoEMethod(layer.moe_config, number, served, self.form) if served else None
        return None


LAYERS: dict[str, Any] = {}
"""Name -> (layer of vLLM, factors by family): an operator is given a name, not a module."""


class GlobeMoEMethod(FusedMoEMethodBase):
    """The experts of one layer that a bank serves."""

    def __init__(self, moe: Any, number: int, served: dict[str, Any], form: str) -> None:
        super().__init__(moe)
        if moe.moe_parallel_config.use_ep:
            raise ValueError(
                "globe: expert parallelism is not supported: start vLLM without --enable-expert-parallel"
            )
        if unknown := set(served) - {"gate", "up", "down"}:
            raise ValueError(f"globe: banks of {min(unknown)} are unknown to this globe-vllm: update it")
        self.number, self.served, self.form = number, served, form

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Make room for the factors, and for down where it stays dense."""
        activation = layer.activation.value
        if activation not in ACTIVATIONS or layer.apply_router_weight_on_input:
            raise ValueError(
                f"globe: experts with the activation {activation} or with weighted inputs can't run factored: serve "
                "the run patched with format=dense"
            )
        p, d = intermediate_size_per_partition, hidden_size
        families = ("gate", "up", "down") if "down" in self.served else ("gate", "up")
        factors = {}
        for family in families:
            number, layout, member = self.served.get(family, (None, None, None))
            if layout is not None and layout["d"] != d:
                raise ValueError(
                    f"globe: the bank of layer {self.number} {family} has {layout['d']} columns and the model {d}: "
                    "patch the run again"
                )
            bank = None if layout is None else self._bank(number, layout, params_dtype)
            factors[family] = Factors(
                num_experts, p, d, layout, member, bank, rank=layer.moe_config.tp_rank, dtype=params_dtype
            )
        PLACES[self.number] = factors
        LAYERS[layer.layer_name] = (layer, factors)
        layer.globe_factors = factors
        if "down" not in self.served:
            weight = torch.empty(num_experts, d, p, dtype=params_dtype)
            layer.register_parameter("w2_weight", torch.nn.Parameter(weight, requires_grad=False))
            set_weight_attrs(layer.w2_weight, attributes)

    def _bank(self, number: int, layout: dict[str, Any], dtype: torch.dtype) -> Bank:
        bank = Bank(layout, dtype)
        if len(layout["members"]) == 1:
            return bank
        known = SHARED.get(f"bank{number}")
        if known is None or not known.absent:  # full: it is of a model that this process built before
            SHARED[f"bank{number}"] = bank
        return SHARED[f"bank{number}"]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse a layer that lacks a factor, and compose its bases if they are to stay. Raises ValueError."""
        for family, factors in layer.globe_factors.items():
            if absent := factors.missing():
                raise ValueError(
                    f"globe: layer {self.number} {family} got no {absent[0]} from the checkpoint: load it with "
                    "load_format=auto, and if that stays, patch the run again"
                )
        if self.form == "composed":
            for factors in layer.globe_factors.values():
                factors.keep_composed()
            if all(factors.bank is None for families in PLACES.values() for factors in families.values()):
                SHARED.clear()

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Any,
    ) -> Tensor:
        """sum over the chosen experts of weight * down(act(gate x) * up x), for x (t, d)."""
        return torch.ops.globe.experts(x, topk_weights, topk_ids, layer.layer_name)


@library.custom_op("globe::experts", mutates_args=())
def experts_of(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    """One operator, so that torch.compile does not look inside: what runs depends on which experts are hit."""
    layer, factors = LAYERS[layer_name]
    k = topk_ids.shape[1]
    flat = topk_ids.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat).tolist()
    experts = [expert for expert, count in enumerate(counts) if count]
    sizes = [counts[expert] for expert in experts]
    rows = x[order // k].split(sizes)
    gate = factors["gate"].project(rows, experts, output=False)
    up = factors["up"].project(rows, experts, output=False)
    inner = (_activated(gate, layer.activation.value) * up).split(sizes)
    if "down" in factors:
        parts = factors["down"].project(inner, experts, output=True)
    else:
        down = layer.w2_weight
        parts = torch.cat(
            [torch.nn.functional.linear(h, down[expert]) for h, expert in zip(inner, experts, strict=True)]
        )
    pairs = parts * topk_weights.reshape(-1)[order, None].to(x.dtype)
    out = torch.empty_like(pairs).index_copy_(0, order, pairs)
    return out.view(*topk_ids.shape, -1).sum(1)


@experts_of.register_fake
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


def _activated(gate: Tensor, name: str) -> Tensor:
    if name == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")
