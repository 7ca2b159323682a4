"""The compact output: factors instead of the compressed experts, everything else as in the original checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from globe.checkpoint import Checkpoint, ShardWriter
from globe.checkpoint.model_config import PREFIX, understood
from globe.checkpoint.quantised.reader import forget_quantisation
from globe.checkpoint.rewrite import copy_plain_support
from globe.config.console import progress_bar
from globe.errors import CheckpointError
from globe.hf.dense_checkpoint import rewriters
from globe.hf.destination import destination, inputs_of, write_record
from globe.hf.experts import GlobeExperts
from globe.hf.few_bits import PARAMETERS
from globe.hf.layout import VERSION_KEY, to_json, unpacked, version_of
from globe.hf.loading import require_sizes
from globe.hf.run_banks import BankEntry, verify_source
from globe.hf.swap import SHARED_BANKS, bank_values, member_values, routed_rows, swap_in


def write_globe(
    entries: tuple[BankEntry, ...],
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    S_cache: int | str = "all",
    packed: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint that plain `AutoModelForCausalLM.from_pretrained` loads once `globe` is imported.

    In the layers that a bank serves, gate and up of the routed experts become factors, and down where a bank serves
    it; of gate and up, a family or an expert that is not compressed stays dense, under a name of its own because
    transformers fuses the two. The
    factors take the dtype of the matrices they replace, unless they are `packed` in the run: those stay as they are
    and become numbers when they are loaded. The shared expert, where a bank has it, is written
    dense, reconstructed. `S_cache` is the cache size the model is loaded with. Streams; the model is built
    without memory, for its names only. Returns the record written beside the weights.

    Raises ArtefactError, CheckpointError or ConfigError before anything is written if a bank is not of this
    checkpoint, its architecture can't run factored, or `out` is taken.
    """
    from globe.hf.quantizer import check_cache

    check_cache(S_cache)
    if checkpoint.dense_only:
        raise CheckpointError(f"{checkpoint.dense_only}: use format=dense")
    if not packed:
        plain = unpacked([entry.layout for entry in entries])
        entries = tuple(replace(entry, layout=one) for entry, one in zip(entries, plain, strict=True))
    layouts = [entry.layout for entry in entries]
    skeleton = build_skeleton(checkpoint)
    modules = swap_in(skeleton, layouts)
    disk, kept = disk_names(skeleton), _kept(entries, checkpoint, modules)
    verify_source(entries, checkpoint)
    description = {
        VERSION_KEY: version_of(layouts),
        "S_cache": S_cache,
        "banks": to_json(layouts),
    }
    config = {
        **checkpoint.config,
        "model_type": PREFIX + checkpoint.model_type,
        "quantization_config": description,
    }
    with destination(out, overwrite=overwrite, inputs=inputs_of(entries, checkpoint)) as folder:
        left_out = copy_plain_support(checkpoint.reader, config, folder)
        with (
            ShardWriter(folder, _largest_shard(checkpoint)) as writer,
            progress_bar(len(kept) + len(disk), "tensor", "writing") as bar,
        ):
            shared = rewriters(entries, checkpoint, shared_only=True)
            for name in kept:
                stored = checkpoint.reader.read(name)
                writer.write(name, shared[name](stored) if name in shared else stored)
                bar.update()
            for name, tensor in _factors(entries, checkpoint, modules):
                writer.write(disk[name], tensor)
                bar.update()
        return write_record(folder, "globe", entries, checkpoint, left_out)


def build_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """Return the checkpoint's model on the meta device: modules, names and shapes without memory.

    Raises CheckpointError if transformers has no pure language model for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with understood(checkpoint.folder):
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        forget_quantisation(config)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CheckpointError(
                f"transformers has no language model for {checkpoint.model_type}: use format=dense"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        require_sizes(config, checkpoint.reader)
    if type(model.config) is not type(config):
        raise CheckpointError(
            f"{checkpoint.model_type} has a text part among others, which can't be compressed into a file of its "
            "own: use format=dense, or patch it in memory with globe.patch_model"
        )
    return model


def disk_names(skeleton: nn.Module) -> dict[str, str]:
    """Return parameter name -> the name that `save_pretrained` gives it, for the parameters of factored experts.

    Some architectures call a module otherwise in files than in memory (`block_sparse_moe`, `mlp`).
    """
    from transformers.core_model_loading import revert_weight_conversion

    prefixes = [name for name, module in skeleton.named_modules() if isinstance(module, GlobeExperts)]
    own = [f"{prefix}.globe_" for prefix in prefixes] + [f"{SHARED_BANKS}."]
    names = [name for name, _ in skeleton.named_parameters() if name.startswith(tuple(own))]
    # one at a time: the result says nothing about which name came from which
    return {name: next(iter(revert_weight_conversion(skeleton, {name: torch.empty(1)}))) for name in names}


def _kept(entries: tuple[BankEntry, ...], checkpoint: Checkpoint, modules: Mapping[int, str]) -> list[str]:
    """Return the names of all tensors but those of the routed experts' families that a `GlobeExperts` holds."""
    gone = set()
    for layer, family in _held(entries, modules):
        experts = range(checkpoint.shape(layer, family).n)
        gone |= {checkpoint.locate(layer, family, expert).tensor for expert in experts}
    return [name for name in checkpoint.reader.names if name not in gone]


def _factors(
    entries: tuple[BankEntry, ...], checkpoint: Checkpoint, modules: Mapping[int, str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of the factored experts, by their names in memory."""
    dense = {place: set(range(checkpoint.shape(*place).n)) for place in _held(entries, modules)}
    for index, entry in enumerate(entries):
        artefact = entry.read()
        for position, member in enumerate(entry.members):
            prefix = f"{modules[member.layer]}.globe_{member.family}"
            dtype = _stored_dtype(checkpoint, member.layer, member.family)
            for name, value in member_values(artefact, position).items():
                if name in entry.layout.packed:
                    own = artefact.packed[name][routed_rows(artefact, position)].tensors()
                    yield from ((f"{prefix}.{name}.{part}", tensor) for part, tensor in own.items())
                else:
                    yield f"{prefix}.{name}", value.to(dtype)
            dense[member.layer, member.family] -= set(member.experts)
        bank = f"{SHARED_BANKS}.bank{index}" if entry.layout.shared else f"{prefix}.bank"
        kept = {PARAMETERS[name]: artefact.packed[name] for name in entry.layout.packed}
        for name, value in bank_values(artefact).items():
            if name in kept:
                own = kept[name].tensors()
                yield from ((f"{bank}.{name}.{part}", tensor) for part, tensor in own.items())
            else:
                yield f"{bank}.{name}", value.to(dtype)
    for (layer, family), experts in dense.items():
        if experts:
            weights = checkpoint.read_experts(layer, family).weights
            yield f"{modules[layer]}.globe_{family}.dense", weights[sorted(experts)]


def _held(entries: tuple[BankEntry, ...], modules: Mapping[int, str]) -> list[tuple[int, str]]:
    """Return the layers and families in `GlobeExperts`: gate and up of every layer served, down where it is served."""
    down = {member.layer for entry in entries for member in entry.members if member.family == "down"}
    return [
        (layer, family)
        for layer in modules
        for family in ("gate", "up", *(("down",) if layer in down else ()))
    ]


def _stored_dtype(checkpoint: Checkpoint, layer: int, family: str) -> torch.dtype:
    return checkpoint.reader.dtype(checkpoint.locate(layer, family, 0).tensor)


def _largest_shard(checkpoint: Checkpoint) -> int:
    """Return the bytes of the largest file of the original, so that the shards are no larger than its."""
    sizes = Counter[str]()
    for name in checkpoint.reader.names:
        sizes[checkpoint.reader.index[name]] += checkpoint.reader.entry(name).nbytes
    return max(sizes.values())
