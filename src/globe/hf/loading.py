"""Load a compact checkpoint, or any other, in one call."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from globe.checkpoint import ShardReader
from globe.checkpoint.hub import EMBEDDED, resolve
from globe.checkpoint.location import count_layers
from globe.checkpoint.model_config import is_compact, read_config, refuse_other_weights, understood
from globe.checkpoint.quantised.reader import (
    DequantisedReader,
    forget_quantisation,
    is_readable,
    open_quantised,
)
from globe.checkpoint.shards import StoredTensor
from globe.errors import CheckpointError
from globe.files import read_json
from globe.hf.experts import GlobeExperts
from globe.hf.layout import QUANT_METHOD, VERSION_KEY, BankLayout, from_json

_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_OF_FILES = ("trust_remote_code", "revision", "cache_dir", "token", "local_files_only")
"""Options of `from_pretrained` that say how files are found."""
_MOST_LAYERS = 1000
"""Where no tensor has the number of a layer in its name."""


def load(
    path: str | Path,
    *,
    S_cache: int | str | None = None,
    dequantize: bool = False,
    keep_packed: bool = False,
    **kwargs: Any,
) -> Any:
    """Load the language model of a checkpoint folder or hub id, or "embedded", in evaluation mode.

    A compact GloBE checkpoint loads factored: `S_cache` bases stay composed per layer and family (None: as the
    file says; 0 recomposes at each call; "all" keeps every one). With `dequantize` it loads as the ordinary
    dense model, which can be saved as one. With `keep_packed`, adapters of few bits stay integers of 8 or 4 bits in
    memory where PyTorch multiplies such (bfloat16 on a CPU, up to 7 bits, one scale a row); the log says where it does
    not. Such a model can't be saved, and its adapters not trained. Ordinary checkpoints load as always, and quantised
    ones that GloBE reads as the plain model they stand for, without the kernels of their method
    (`quantization_config` as one of `kwargs` has transformers load them its own way). `kwargs` (`dtype`, `device_map`,
    `revision`, ...) go to `AutoModelForCausalLM.from_pretrained`. Dense experts too small for transformers' grouped
    product run by its plain loop, unless `experts_implementation` is given.

    Raises ConfigError for an impossible `S_cache`, and CheckpointError where there is no checkpoint, where a tensor of
    the model is missing (transformers would draw it at random), and where transformers can't read it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from globe.hf.quantizer import check_cache
    from globe.hf.register import install

    install()
    if str(path) == EMBEDDED and not Path(path).is_dir():
        path = resolve(EMBEDDED).folder
    reader = _checked_files(local) if (local := Path(path).expanduser()).is_dir() else None
    kwargs.setdefault("trust_remote_code", False)  # not given, transformers would ask at the terminal
    hub = {key: kwargs[key] for key in _OF_FILES if key in kwargs}
    with understood(path):
        config = AutoConfig.from_pretrained(str(path), **hub)
    description = getattr(config, "quantization_config", None)
    if isinstance(description, dict) and description.get("quant_method") == "globe":
        if S_cache is not None:
            description["S_cache"] = check_cache(S_cache)
        description |= {"dequantize": dequantize, "keep_packed": keep_packed}
    elif reader is None and "quantization_config" not in kwargs and is_readable(config.to_dict()):
        folder = resolve(str(path), revision=kwargs.pop("revision", None)).folder
        return load(folder, **kwargs)
    with understood(path):
        if isinstance(reader, DequantisedReader) and "quantization_config" not in kwargs:
            forget_quantisation(config)
            require_sizes(config, reader)
            model, found = _plain_model(config, reader, kwargs)
        else:
            if reader is not None:
                require_sizes(config, reader)
            model, found = AutoModelForCausalLM.from_pretrained(
                str(path), config=config, output_loading_info=True, use_safetensors=True, **kwargs
            )
    _require_whole(config, found, path, reader)
    if "experts_implementation" not in kwargs and _has_misaligned_experts(model):
        model.set_experts_implementation("eager")
    return model.eval()


def _plain_model(
    config: Any, reader: DequantisedReader, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Load the model of a quantised checkpoint with the tensors that its matrices stand for, one by one."""
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"transformers has no language model for {config.model_type}: dequantise it first"
        )
    config.dtype = config.dtype or reader.plain_dtype
    tensors = {name: StoredTensor(reader, name) for name in reader.names}
    options = {key: value for key, value in kwargs.items() if key not in _OF_FILES}
    model, found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=tensors, output_loading_info=True, **options
    )
    if (reader.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(reader.folder))
    return model, found


def quiet() -> None:
    """Keep bars and remarks of transformers from between a command's own lines."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _checked_files(folder: Path) -> ShardReader:
    """Check with bounds what transformers will read without: the tensors, and the files of JSON."""
    config = read_config(folder)
    refuse_other_weights(config, folder)
    reader = ShardReader(folder)
    if not is_compact(config) and is_readable(config):
        reader = open_quantised(reader, config)
    held = count_layers(reader.names) or _MOST_LAYERS
    for part in (config, config.get("text_config")):
        promised = [part.get(key) for key in _LAYERS] if isinstance(part, dict) else []
        if excess := [one for one in promised if isinstance(one, int) and one > held]:
            raise CheckpointError(
                f"{folder}/config.json promises {excess[0]} layers and the files have {held}: correct config.json, or "
                "save or download the checkpoint again"
            )
    generation = folder / "generation_config.json"
    if os.path.lexists(generation):
        try:
            read_json(generation, strict=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{generation} can't be read ({error}): correct or remove it") from error
    return reader


def require_sizes(config: Any, reader: ShardReader) -> None:
    """Raise CheckpointError if the model of `config` has far more parameters than the files have numbers.

    It is built without memory for that; with it, wrong sizes in a `config.json` could ask for any amount.
    """
    from transformers import AutoModelForCausalLM

    from globe.hf.swap import swap_in

    description = getattr(config, "quantization_config", None)
    layouts: tuple[BankLayout, ...] = ()
    if isinstance(description, dict) and description.get("quant_method") == QUANT_METHOD:
        layouts = from_json(description.get("banks"), description.get(VERSION_KEY))
    elif description is not None:
        return  # packed numbers, several in one
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if layouts:
            swap_in(model, layouts)
    needed = sum(parameter.numel() for parameter in model.parameters())
    entries = [reader.entry(name) for name in reader.names]
    # twice: of fewer, transformers names those that are missing; packed factors have at least two bits each
    most = max(
        2 * sum(math.prod(one.shape) for one in entries), 4 * sum(one.nbytes for one in entries if layouts)
    )
    if needed > most:
        raise CheckpointError(
            f"the model that {reader.folder}/config.json describes has {needed:,} parameters, and the files hold far "
            "fewer numbers: correct config.json, or save or download the checkpoint again"
        )


def _require_whole(config: Any, found: dict[str, Any], path: str | Path, reader: ShardReader | None) -> None:
    """Raise CheckpointError if tensors were missing, or left over where the files are of a language model alone.

    Biases of zeros may be left over: GPTQ's older writers give one to every layer that they quantise.
    """
    missing = sorted(found["missing_keys"])
    left = sorted(name for name in found["unexpected_keys"] if not _is_zero_bias(name, reader))
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors of the model, such as {missing[0]}: save or download it again"
        )
    if left and not hasattr(config, "text_config"):
        raise CheckpointError(
            f"{path} has {len(left)} tensors that are not of the model, such as {left[0]}: give config.json and "
            "weights that belong together"
        )


def _is_zero_bias(name: str, reader: ShardReader | None) -> bool:
    return (
        reader is not None and name.endswith(".bias") and name in reader and not bool(reader.read(name).any())
    )


def _has_misaligned_experts(model: nn.Module) -> bool:
    """Return whether there are dense experts that transformers' default, a grouped matrix product, can't multiply.

    It needs rows of a multiple of 16 bytes, of weights as they lie or transposed, which small experts in half
    precision may not have.
    """
    for module in model.modules():
        if type(module).__name__.endswith("Experts") and not isinstance(module, GlobeExperts):
            weights = [one for one in module.parameters() if one.dim() == 3]
            if any(side * one.element_size() % 16 for one in weights for side in one.shape[-2:]):
                return True
    return False
