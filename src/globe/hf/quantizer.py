"""GloBE as a quantisation method of transformers: what lets plain `from_pretrained` load a compact checkpoint.

The `config.json` of a compact checkpoint: the original's, with another model type and a list of banks.

Two things in the file keep a program that lacks GloBE from going on with random experts: the model type is
unknown to transformers' Auto classes, and `quantization_config` names no `quant_method`, at which the model
classes themselves stop. Both are put back in memory, so that everything else in transformers sees the
architecture it knows; both are written again by `save_pretrained`.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from globe.checkpoint.model_config import PREFIX
from globe.errors import ArtefactError, CheckpointError, ConfigError
from globe.hf.experts import GlobeExperts
from globe.hf.few_bits import unpack
from globe.hf.layout import (
    QUANT_METHOD,
    VERSION,
    VERSION_KEY,
    BankLayout,
    from_json,
    to_json,
    unpacked,
    version_of,
)
from globe.hf.swap import SHARED_BANKS, swap_in, swap_out

SCache = int | str
_log = logging.getLogger(__name__)


@register_quantization_config(QUANT_METHOD)
class GlobeQuantizationConfig(QuantizationConfigMixin):
    """The banks of a compact checkpoint. `S_cache`: bases kept composed per layer and family, or "all".

    `dequantize` loads dense weights instead, and `keep_packed` leaves packed adapters packed; neither is ever written.
    """

    def __init__(
        self,
        banks: Any = (),
        globe_version: Any = VERSION,
        S_cache: SCache = "all",
        dequantize: bool = False,
        keep_packed: bool = False,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.layouts: tuple[BankLayout, ...] = from_json(banks, globe_version)
        self.S_cache = check_cache(S_cache)
        self.dequantize = dequantize
        self.keep_packed = keep_packed

    def to_dict(self) -> dict[str, Any]:
        """Return the record of `config.json`, without `quant_method`, so that nothing loads it that lacks GloBE."""
        return {
            VERSION_KEY: version_of(self.layouts),
            "S_cache": self.S_cache,
            "banks": to_json(self.layouts),
        }


@register_quantizer(QUANT_METHOD)
class GlobeQuantizer(HfQuantizer):
    """Swaps the factored experts in before weights are loaded, and out again to dequantise."""

    is_compileable = True
    requires_calibration = True  # transformers' name for: loads compressed checkpoints only
    quantization_config: GlobeQuantizationConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        swap_in(model, self.quantization_config.layouts)
        set_cache(model, self.quantization_config.S_cache)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        require_loaded(model)
        # so a model saved again has plain factors
        unpack(model, model.dtype, keep=self.quantization_config.keep_packed)
        self.quantization_config.layouts = unpacked(self.quantization_config.layouts)
        # older transformers leave converted tensors in the dtype of the file
        if not hasattr(HfQuantizer, "get_new_dtype"):
            unify_dtype(model)
        return self._dequantize(model) if self.quantization_config.dequantize else model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> nn.Module:
        # once a model was saved, its config says the dtype as text
        swap_out(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        # loading left the conversions it used, none of them for gate and up; None stands for all those of the
        # architecture, without which a saved model would not have its upstream names
        model._weight_conversions = None
        return model

    def is_serializable(self) -> bool:
        """Return whether factors are as a file has them; those that `keep_packed` rearranged are not."""
        if self.quantization_config.keep_packed:
            _log.warning("a model loaded with keep_packed can't be saved: load it without")
        return not self.quantization_config.keep_packed

    @property
    def is_trainable(self) -> bool:
        return True


def require_loaded(model: nn.Module) -> None:
    """Raise CheckpointError if a factor had no tensor in the files, where transformers would only warn."""
    for name, parameter in model.named_parameters():
        ours = ".globe_" in name or name.startswith(SHARED_BANKS)
        if ours and parameter.device.type != "meta" and not getattr(parameter, "_is_hf_initialized", False):
            raise CheckpointError(
                f"the compact checkpoint lacks {name}, or has it with another shape: patch again"
            )


def unify_dtype(model: Any) -> None:
    """Give every parameter the dtype the model was loaded in, but for those it always keeps in float32."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    dtype = model.config.dtype
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def attach(model: Any, layouts: tuple[BankLayout, ...], S_cache: SCache) -> None:
    """Make a model patched in memory behave as a loaded one: `save_pretrained`, `dequantize`, its config."""
    config = GlobeQuantizationConfig(to_json(layouts), S_cache=S_cache)
    mark(model.config)
    model.config.quantization_config = config
    model.hf_quantizer = GlobeQuantizer(config, pre_quantized=True)
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True
    set_cache(model, S_cache)


def check_cache(value: Any) -> SCache:
    """Return `value` if it is a possible cache size. Raises ConfigError otherwise."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if value != "all" and not whole:
        raise ConfigError(
            f"S_cache={value!r} is not possible: give a number of experts of at least 0, or all"
        )
    return value


def set_cache(model: nn.Module, S_cache: SCache) -> None:
    """Set how many experts' bases every layer and family keeps composed: 0 none, an integer, or "all" of them."""
    check_cache(S_cache)
    for module in model.modules():
        if isinstance(module, GlobeExperts):
            for projection in module.projections.values():
                held = len(projection.row)
                projection.cache.capacity = held if S_cache == "all" else min(int(S_cache), held)
                projection.clear_cache()


def compact_config(config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """Read a compact checkpoint's `config.json`; arguments and result as of `PreTrainedConfig.from_dict`."""
    require_plugin()
    upstream = str(config_dict["model_type"]).removeprefix(PREFIX)
    described = config_dict.get("quantization_config")
    if not isinstance(described, dict):
        raise ArtefactError("config.json of the compact checkpoint describes no banks: patch the run again")
    described = {**described, "quant_method": QUANT_METHOD}
    known = {**config_dict, "model_type": upstream, "quantization_config": described}
    return marked(CONFIG_MAPPING[upstream]).from_dict(known, **kwargs)


def require_plugin() -> None:
    """Raise CheckpointError inside a vLLM that lacks GloBE's plugin.

    vLLM would read the configuration, drop the factors, whose names it does not know, and generate from random experts.
    """
    methods = getattr(
        sys.modules.get("vllm.model_executor.layers.quantization"), "QUANTIZATION_METHODS", None
    )
    if ("vllm.config" in sys.modules and methods is None) or (
        methods is not None and QUANT_METHOD not in methods
    ):
        raise CheckpointError(
            "vLLM serves compact GloBE checkpoints by a plugin: pip install globe-vllm (integrations/vllm of GloBE), "
            "or serve the run patched with format=dense"
        )


@functools.cache
def marked(base: Any) -> Any:
    """Return a configuration class that writes the `globe_*` model type as long as it describes banks.

    It bears the name of `base`, by which transformers' Auto classes find the model class.
    """

    def to_dict(self: PreTrainedConfig) -> dict[str, Any]:
        written = base.to_dict(self)
        if VERSION_KEY in (written.get("quantization_config") or {}):
            written["model_type"] = PREFIX + base.model_type
        return written

    return type(base.__name__, (base,), {"__module__": __name__, "to_dict": to_dict})


def mark(config: Any) -> None:
    """Turn the configuration of a model in memory into a marked one, in place."""
    base: Any = type(config)
    if base.__module__ != __name__:
        config.__class__ = marked(base)
