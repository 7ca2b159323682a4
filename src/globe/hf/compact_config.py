"""The `config.json` of a compact checkpoint: the original's, with another model type and a list of banks.

Two things in the file keep a program that lacks GloBE from going on with random experts: the model type is
unknown to transformers' Auto classes, and `quantization_config` names no `quant_method`, at which the model
classes themselves stop. Both are put back in memory, so that everything else in transformers sees the
architecture it knows; both are written again by `save_pretrained`.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from globe.hf.layout import VERSION_KEY
from globe.hf.register import PREFIX

QUANT_METHOD = "globe"


def compact_config(config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """Read a compact checkpoint's `config.json`; arguments and result as of `PreTrainedConfig.from_dict`."""
    import globe.hf.quantizer  # noqa: F401  registers the quantiser that the returned configuration asks for

    upstream = str(config_dict["model_type"]).removeprefix(PREFIX)
    described = {**config_dict.get("quantization_config", {}), "quant_method": QUANT_METHOD}
    known = {**config_dict, "model_type": upstream, "quantization_config": described}
    return marked(CONFIG_MAPPING[upstream]).from_dict(known, **kwargs)


@functools.cache
def marked(base: Any) -> Any:
    """A configuration class that writes the `globe_*` model type as long as it describes banks.

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
