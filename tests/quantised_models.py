"""Tiny checkpoints quantised as the public libraries do it, and what those libraries read from them.

FP8 is written and read by transformers, compressed-tensors by its library, MXFP4 by hand and read by transformers. GPTQ
and AWQ, whose libraries want a GPU, are packed by loops that follow the published layouts and dequantised number by
number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_models import write_tiny

WIDE: dict[str, Any] = {"hidden_size": 96, "vocab_size": 48}
"""Sizes that every group of 16 and 32 divides; with an intermediate size of 64 no two are equal."""
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": WIDE | {"moe_intermediate_size": 64, "intermediate_size": 160, "head_dim": 32},
    "deepseek_v3": WIDE
    | {"moe_intermediate_size": 64, "intermediate_size": 160, "q_lora_rank": 32, "kv_lora_rank": 32}
    | {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32},
    "mixtral": WIDE | {"intermediate_size": 64, "head_dim": 32},
    "gpt_oss": WIDE | {"intermediate_size": 64, "head_dim": 32},
}
Quantised = tuple[dict[str, Tensor], Tensor]
"""Tensors to store by suffix of the module's name, and the matrix they stand for, by the library."""


def write_quantised(
    folder: Path,
    model_type: str,
    config: dict[str, Any],
    quantise: Callable[[str, Tensor], Quantised | None],
    **options: Any,
) -> dict[str, Tensor]:
    """Write a quantised checkpoint in two files; return its plain tensors in bfloat16, quantised ones dequantised.

    `quantise` gets the name of a module or stack of experts and its weight; None leaves it as it is.
    """
    plain = write_tiny(model_type, folder / "plain", dtype=torch.bfloat16, **SIZES[model_type], **options)
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        is_matrix = tensor.dim() >= 2 and not any(
            one in name for one in ("embed", "lm_head", "bias", ".gate.", "router")
        )
        module = name.removesuffix(".weight")
        made = quantise(module, tensor) if is_matrix else None
        if made is None:
            stored[name] = expected[name] = tensor
        else:
            stored |= {module + suffix: part.contiguous() for suffix, part in made[0].items()}
            expected[name] = made[1].to(torch.bfloat16)
    names = sorted(stored)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in files.items():
        save_file({name: stored[name] for name in inside}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    record = json.loads((plain / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(record))
    for path in plain.iterdir():
        path.unlink()
    plain.rmdir()
    return expected


# --- FP8 with block scales, by transformers

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 16], "fmt": "e4m3"}


def fp8_blocks(module: str, weight: Tensor) -> Quantised:
    from types import SimpleNamespace

    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    owner = SimpleNamespace(
        quantization_config=FineGrainedFP8Config(weight_block_size=tuple(FP8["weight_block_size"]))
    )
    made = Fp8Quantize(owner)._quantize_one("x.weight", weight)
    values, scale = made["x.weight"], made["x.weight_scale_inv"]
    dense = Fp8Dequantize(owner)._dequantize_one(values, scale, torch.float32)
    if weight.dim() == 3:
        return {"": values, "_scale_inv": scale}, dense
    return {".weight": values, ".weight_scale_inv": scale}, dense


# --- FP8 with a scale for each output, by the layout that transformers gives FBGEMM's

FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}


def fbgemm(module: str, weight: Tensor) -> Quantised:
    """Scales are (outputs, 1); of stacks that lie transposed, as in Llama 4, (experts, 1, outputs)."""
    matrix = weight.float()
    inputs = 1 if weight.dim() == 3 else -1
    scale = matrix.abs().amax(inputs, keepdim=True) / 448
    values = (matrix / scale).to(torch.float8_e4m3fn)
    dense = values.float() * scale
    return (
        {"": values, "_scale": scale} if weight.dim() == 3 else {".weight": values, ".weight_scale": scale}
    ), dense


# --- compressed-tensors, by its library

COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 16]},
    ),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
    "int8 channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 asymmetric": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ),
    "int4 group": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
    "int4 channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "int4 asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int3 group": ("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32}),
    "int8 packed": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    ),
}


def compressed_config(kind: str) -> dict[str, Any]:
    form, weights = COMPRESSED[kind]
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$"],
    }


def compressed(kind: str) -> Callable[[str, Tensor], Quantised]:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    form, options = COMPRESSED[kind]
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**{"symmetric": True, **options})
    )
    library = BaseCompressor.get_value_from_registry(form)

    def quantise(module: str, weight: Tensor) -> Quantised:
        matrix = weight.float()
        least, most = _extremes(matrix, options)
        whole = generate_gparam(matrix.min(), matrix.max()) if kind == "nvfp4" else None
        scale, zero = calculate_qparams(
            least, most, scheme.weights, **({} if whole is None else {"global_scale": whole})
        )
        state = {"weight": matrix, "weight_scale": scale.float(), "weight_zero_point": zero}
        if whole is not None:
            state["weight_global_scale"] = whole
        made = library.compress(state, scheme)
        dense = library.decompress(made, scheme)["weight"]
        return {f".{name}": part for name, part in made.items()}, dense.float()

    return quantise


def _extremes(matrix: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of what shares a scale."""
    rows, columns = matrix.shape
    match options["strategy"]:
        case "tensor":
            return matrix.min().reshape(1), matrix.max().reshape(1)
        case "channel":
            high, wide = 1, columns
        case "block":
            high, wide = options["block_structure"]
        case _:
            high, wide = 1, options["group_size"]
    blocks = matrix.reshape(rows // high, high, columns // wide, wide)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


ACT_ORDER: dict[str, Any] = compressed_config("int4 group")
ACT_ORDER["config_groups"]["group_0"]["weights"]["actorder"] = "group"


def act_order(module: str, weight: Tensor) -> Quantised:
    """Inputs in groups that `weight_g_idx` names, as the library wrote them until it gave the order up."""
    outputs, inputs = weight.shape
    generator = torch.Generator().manual_seed(inputs)
    order = (torch.arange(inputs) // 16)[torch.randperm(inputs, generator=generator)]
    scales = (torch.rand(outputs, inputs // 16, generator=generator) * 0.02 + 0.01).bfloat16()
    numbers = torch.empty(outputs, inputs, dtype=torch.int64)
    dense = torch.empty(outputs, inputs)
    for i in range(inputs):
        scale = scales[:, order[i]].float()
        numbers[:, i] = torch.round(weight[:, i].float() / scale).clamp(-8, 7).long()
        dense[:, i] = scale * numbers[:, i]
    shape = torch.tensor([outputs, inputs])
    made = {
        ".weight_packed": _bitstream(numbers + 8, 4),
        ".weight_scale": scales,
        ".weight_g_idx": order.int(),
    }
    return made | {".weight_shape": shape}, dense


# --- MXFP4 of gpt-oss: written by the layout, read by transformers

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def mxfp4(module: str, weight: Tensor) -> Quantised | None:
    """Blocks of experts alone; nothing else of gpt-oss is quantised."""
    from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

    if weight.dim() != 3:
        return None
    rows = weight.float().mT  # experts, outputs, inputs
    groups = rows.unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp_min(2**-20))) - 2
    table = torch.tensor(FP4_VALUES)
    nearest = (groups / exponent.exp2()[..., None]).unsqueeze(-1).sub(table).abs().argmin(-1).byte()
    blocks = nearest[..., ::2] | (nearest[..., 1::2] << 4)
    scales = (exponent + 127).byte()
    return {"_blocks": blocks, "_scales": scales}, convert_moe_packed_tensors(
        blocks, scales, dtype=torch.float32
    )


# --- GPTQ and AWQ, by the published layouts


def gptq_config(
    bits: int, *, group: int = 32, version: str = "gptq", desc_act: bool = True
) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": desc_act,
        "sym": False,
        "checkpoint_format": version,
    }


def gptq(
    bits: int, *, group: int = 32, version: str = "gptq", desc_act: bool = True
) -> Callable[[str, Tensor], Quantised]:
    def quantise(module: str, weight: Tensor) -> Quantised:
        outputs, inputs = weight.shape
        generator = torch.Generator().manual_seed(inputs)
        order = torch.arange(inputs) // group
        if desc_act:
            order = order[torch.randperm(inputs, generator=generator)]
        groups = int(order.max()) + 1
        scales = (torch.rand(groups, outputs, generator=generator) * 0.01 + 0.01).half()
        zeros = torch.randint(1, 1 << bits, (groups, outputs), generator=generator)
        numbers = torch.empty(inputs, outputs, dtype=torch.int64)
        dense = torch.empty(outputs, inputs)
        for i in range(inputs):
            scale, zero = scales[order[i]].float(), zeros[order[i]]
            numbers[i] = (torch.round(weight[:, i].float() / scale) + zero).clamp(0, (1 << bits) - 1).long()
            dense[:, i] = scale * (numbers[i] - zero).float()
        stored = zeros - 1 if version == "gptq" else zeros
        made = {
            ".qweight": _bitstream(numbers.T, bits).T,
            ".qzeros": _bitstream(stored, bits),
            ".scales": scales,
            ".g_idx": order.int(),
        }
        return made, dense

    return quantise


def _bitstream(numbers: Tensor, bits: int) -> Tensor:
    """Rows of integers as words: all bits in a row, the lowest of each integer first, 32 to a word."""
    stream = (numbers.unsqueeze(-1) >> torch.arange(bits) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 32))
    return (stream.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1).int()


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output in each four bits of a word, from the lowest."""


def awq(module: str, weight: Tensor) -> Quantised:
    outputs, inputs = weight.shape
    generator = torch.Generator().manual_seed(inputs)
    scales = (torch.rand(inputs // 32, outputs, generator=generator) * 0.01 + 0.01).half()
    zeros = torch.randint(0, 16, (inputs // 32, outputs), generator=generator)
    numbers = torch.empty(inputs, outputs, dtype=torch.int64)
    dense = torch.empty(outputs, inputs)
    for i in range(inputs):
        scale, zero = scales[i // 32].float(), zeros[i // 32]
        numbers[i] = (torch.round(weight[:, i].float() / scale) + zero).clamp(0, 15).long()
        dense[:, i] = scale * (numbers[i] - zero).float()

    def packed(table: Tensor) -> Tensor:
        mixed = table.view(len(table), -1, 8)[..., list(_AWQ_ORDER)].flatten(-2)
        return _bitstream(mixed, 4)

    return {".qweight": packed(numbers), ".qzeros": packed(zeros), ".scales": scales}, dense


def modelopt(module: str, weight: Tensor) -> Quantised:
    """NVFP4 of ModelOpt is that of compressed-tensors, its scale of the tensor inverted."""
    parts, _ = compressed("nvfp4")(module, weight)
    scale = (1 / parts[".weight_global_scale"].float()).reshape(())
    values = made_of_nibbles(parts[".weight_packed"])
    dense = values * (parts[".weight_scale"].float() * scale).repeat_interleave(16, 1)
    return {
        ".weight": parts[".weight_packed"],
        ".weight_scale": parts[".weight_scale"],
        ".weight_scale_2": scale,
    }, dense


def made_of_nibbles(packed: Tensor) -> Tensor:
    """FP4 numbers of bytes, the low half first, from their bits: sign, exponent (2), mantissa (1)."""
    bits = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()
    exponent, mantissa = (bits >> 1) & 3, (bits & 1) / 2
    size = torch.where(exponent > 0, 2.0 ** (exponent - 1) * (1 + mantissa), mantissa)
    return torch.where(bits >= 8, -size, size)
