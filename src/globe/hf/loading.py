"""Load a compact checkpoint, or any other, in one call."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from globe.checkpoint.hub import EMBEDDED, resolve
from globe.errors import CheckpointError
from globe.hf.experts import GlobeExperts


def load(
    path: str | Path, *, S_cache: int | str | None = None, dequantize: bool = False, **kwargs: Any
) -> Any:
    """Load the language model of a checkpoint folder or hub id, or "embedded", in evaluation mode.

    A compact GloBE checkpoint loads factored: `S_cache` bases stay composed per layer and family (None: as the
    file says; 0 recomposes at each call; "all" keeps every one). With `dequantize` it loads as the ordinary
    dense model, which can be saved as one. Ordinary checkpoints load as always. `kwargs` (`dtype`,
    `device_map`, `revision`, ...) go to `AutoModelForCausalLM.from_pretrained`. Dense experts too small for
    transformers' grouped product run by its plain loop, unless `experts_implementation` is given.

    Raises ConfigError for an impossible `S_cache`, and CheckpointError where there is no checkpoint.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from globe.hf.quantizer import check_cache
    from globe.hf.register import install

    install()
    if str(path) == EMBEDDED and not Path(path).is_dir():
        path = resolve(EMBEDDED).folder
    hub = {
        key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs
    }
    try:
        config = AutoConfig.from_pretrained(str(path), **hub)
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} is neither a checkpoint folder nor a model on the hub that can be had: correct it"
        ) from error
    description = getattr(config, "quantization_config", None)
    if isinstance(description, dict) and description.get("quant_method") == "globe":
        if S_cache is not None:
            description["S_cache"] = check_cache(S_cache)
        description["dequantize"] = dequantize
    model = AutoModelForCausalLM.from_pretrained(str(path), config=config, **kwargs).eval()
    if "experts_implementation" not in kwargs and _has_misaligned_experts(model):
        model.set_experts_implementation("eager")
    return model


def quiet() -> None:
    """Keep bars and remarks of transformers from between a command's own lines."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _has_misaligned_experts(model: nn.Module) -> bool:
    """Are there dense experts that transformers' default, a grouped matrix product, can't multiply?

    It needs rows of a multiple of 16 bytes, which small experts in half precision may not have.
    """
    for module in model.modules():
        if type(module).__name__.endswith("Experts") and not isinstance(module, GlobeExperts):
            weights = [one for one in module.parameters() if one.dim() == 3]
            if any(one.shape[-1] * one.element_size() % 16 for one in weights):
                return True
    return False
