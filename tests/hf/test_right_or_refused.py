"""A patched model is the model that transformers loads, or there is a sentence: damaged and unusual checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import lossless_bank, write_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from globe.checkpoint import copy_checkpoint, open_checkpoint
from globe.errors import CheckpointError, GlobeError
from globe.hf.dense_checkpoint import write_dense
from globe.hf.globe_checkpoint import write_globe
from globe.hf.loading import load
from globe.hf.run_banks import open_run, open_source
from tiny_models import write_tiny

INDEX = "model.safetensors.index.json"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
Change = Callable[[Path], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of several shards."""
    return write_tiny("qwen3_moe", tmp_path / "model", max_shard_size="20KB")


def logits(folder: Path) -> Tensor:
    """As plain transformers gives them, without any check of ours."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return loaded(input_ids=torch.arange(1, 30)[None]).logits


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    record = index_of(folder)
    change(record["weight_map"])
    (folder / INDEX).write_text(json.dumps(record))


def edit_names(folder: Path, change: Callable[[str], str]) -> None:
    """Rename tensors in all shards, and in the index."""
    for shard in folder.glob("*.safetensors"):
        save_file({change(k): v for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    record = index_of(folder)
    record["weight_map"] = {change(name): shard for name, shard in record["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(record))


def into_one(folder: Path) -> None:
    tensors = {k: v for shard in folder.glob("*.safetensors") for k, v in load_file(shard).items()}
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def one_beside_the_index(folder: Path, tmp: Path) -> None:
    other = write_tiny("qwen3_moe", tmp / "other", seed=1)
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")


def shards_below(folder: Path) -> None:
    (folder / "below").mkdir()
    for shard in folder.glob("*.safetensors"):
        shard.rename(folder / "below" / shard.name)
    edit_index(folder, lambda names: names.update({k: f"below/{v}" for k, v in names.items()}))


def twice(folder: Path) -> None:
    shard = folder / index_of(folder)["weight_map"][O_PROJ]
    other = next(one for one in sorted(folder.glob("*.safetensors")) if one != shard)
    tensors = load_file(other) | {O_PROJ: torch.randn_like(load_file(shard)[O_PROJ])}
    save_file(tensors, other, metadata={"format": "pt"})


def stale_shards(folder: Path) -> None:
    """A model merged into one file, whose old shards and index were left: transformers takes the one file."""
    tensors = {k: v for shard in folder.glob("*.safetensors") for k, v in load_file(shard).items()}
    tensors[O_PROJ] = torch.randn_like(tensors[O_PROJ])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_index(folder: Path) -> None:
    """The same, with the index removed: the shards that are left must not go into a patched model."""
    stale_shards(folder)
    (folder / INDEX).unlink()


def fused_as_well(folder: Path) -> None:
    into_one(folder)
    (folder / INDEX).unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.randn(6, 40, 24)
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.randn(6, 24, 20)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def unnamed_shard(folder: Path) -> None:
    save_file({"mtp.weight": torch.ones(3)}, folder / "mtp.safetensors", metadata={"format": "pt"})


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


RIGHT: dict[str, Change] = {
    "as saved": lambda folder: None,
    "one file that its index names": lambda folder: (
        into_one(folder),
        edit_index(folder, lambda names: names.update(dict.fromkeys(names, "model.safetensors"))),
    ),
    "shards in a folder below": shards_below,
    "names without model.": lambda folder: edit_names(folder, lambda name: name.removeprefix("model.")),
    "names with model. twice": lambda folder: edit_names(folder, lambda name: f"model.{name}"),
    "a shard that no index names": unnamed_shard,
    "one file and stale shards without an index": without_index,
    "an index in another order": lambda folder: edit_index(
        folder, lambda names: [names.update({name: names.pop(name)}) for name in sorted(names, reverse=True)]
    ),
}
REFUSED: dict[str, tuple[Change, str]] = {
    "one file beside the index": (
        lambda folder: one_beside_the_index(folder, folder.parent),
        r"both model\.safetensors, which transformers loads, and model\.safetensors\.index\.json",
    ),
    "a tensor the index omits": (
        lambda folder: edit_index(folder, lambda names: names.pop(O_PROJ)),
        rf"index\.json omits {O_PROJ}, which is in model-0",
    ),
    "an expert the index omits": (
        lambda folder: edit_index(
            folder, lambda names: names.pop("model.layers.1.mlp.experts.5.up_proj.weight")
        ),
        "omits model.layers.1.mlp.experts.5",
    ),
    "a tensor in two shards": (twice, f"{O_PROJ} is in model-0.* and in model-0"),
    "a tensor in another shard than the index says": (
        lambda folder: edit_index(
            folder,
            lambda names: names.update({O_PROJ: next(one for one in names.values() if one != names[O_PROJ])}),
        ),
        f"names {O_PROJ} in model-0.*, and it is in model-0",
    ),
    "stale shards": (stale_shards, r"both model\.safetensors"),
    "experts in two layouts": (fused_as_well, "layer 1 are there twice"),
    "experts under two prefixes": (
        lambda folder: edit_names(
            folder, lambda name: name.removeprefix("model.") if ".0." in name else name
        ),
        "experts have names of two kinds",
    ),
    "weights under another name": (
        lambda folder: configured(folder, transformers_weights="other.safetensors"),
        "transformers_weights",
    ),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "more layers than the files have": (
        lambda folder: configured(folder, num_hidden_layers=10**9),
        "has the tensors of 2 layers and config.json promises 1000000000",
    ),
}


@pytest.mark.parametrize("what", RIGHT)
def test_both_patched_forms_of_a_lossless_run_are_the_model_that_transformers_loads(
    what: str, model: Path, tmp_path: Path
) -> None:
    RIGHT[what](model)
    expected = logits(model)
    checkpoint = open_checkpoint(str(model))
    places = [(layer, family) for layer in checkpoint.moe_layers for family in ("up", "gate")]
    run = write_run(tmp_path / "run", [lossless_bank(checkpoint, place) for place in places])
    entries = open_run(run)
    write_dense(entries, open_source(entries), tmp_path / "dense")
    write_globe(entries, open_source(entries), tmp_path / "globe")
    assert torch.equal(logits(tmp_path / "dense"), expected)
    torch.testing.assert_close(logits(tmp_path / "globe"), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load(model)(input_ids=torch.arange(1, 30)[None]).logits, expected)


@pytest.mark.parametrize("metadata", [None, [], "x"])
def test_an_index_that_transformers_would_not_load_is_mended_in_the_copy(
    metadata: object, model: Path, tmp_path: Path
) -> None:
    expected = logits(model)
    record = index_of(model)
    del record["metadata"]
    (model / INDEX).write_text(json.dumps(record if metadata is None else record | {"metadata": metadata}))
    copy_checkpoint(model, tmp_path / "copy", {})
    assert torch.equal(logits(tmp_path / "copy"), expected)
    with pytest.raises(CheckpointError, match="transformers can't load"):
        load(model)


@pytest.mark.parametrize("what", REFUSED)
def test_what_some_programs_would_read_otherwise_is_refused_with_both_names(what: str, model: Path) -> None:
    change, sentence = REFUSED[what]
    change(model)
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(str(model))


MISSING = {
    "a tensor was renamed": (
        lambda folder: edit_names(
            folder, lambda name: name.replace("1.self_attn.q_proj", "1.self_attn.q_projection")
        ),
        r"lacks 1 tensors of the model, such as model\.layers\.1\.self_attn\.q_proj\.weight",
    ),
    "a tensor too many": (
        lambda folder: edit_names(folder, lambda name: name) or add_tensor(folder),
        r"has 1 tensors that are not of the model, such as model\.layers\.1\.extra",
    ),
    "a vocabulary of 10^12": (lambda folder: configured(folder, vocab_size=10**12), "describes has 48,000,0"),
    "heads of no size": (
        lambda folder: configured(folder, num_attention_heads=0, head_dim=None),
        "transformers can't load",
    ),
    "text for a size": (lambda folder: configured(folder, hidden_size="twenty"), "transformers can't load"),
    "an activation of no name": (
        lambda folder: configured(folder, hidden_act="\x1b[2Jsilu"),
        r"can't load .*x1b\[2Jsilu",
    ),
    "remote code": (
        lambda folder: configured(folder, model_type="unheard_of", auto_map={"AutoConfig": "evil.Config"}),
        "transformers can't load",
    ),
    "deep generation options": (
        lambda folder: (folder / "generation_config.json").write_text("[" * 10**5),
        "generation_config.json can't be read",
    ),
}


def add_tensor(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    save_file(load_file(shard) | {"model.layers.1.extra": torch.ones(2)}, shard, metadata={"format": "pt"})
    edit_index(folder, lambda names: names.update({"model.layers.1.extra": shard.name}))


@pytest.mark.parametrize("what", MISSING)
def test_a_model_that_transformers_would_fill_at_random_or_not_read_is_one_sentence(
    what: str, model: Path
) -> None:
    change, sentence = MISSING[what]
    change(model)
    with pytest.raises(GlobeError, match=sentence) as caught:
        load(model)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "no such"}, {"rope_scaling": 3}, {"num_attention_heads": "two"}]
)
def test_a_config_that_transformers_refuses_is_one_sentence_in_the_compact_form(
    changes: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(model))
    run = write_run(tmp_path / "run", [lossless_bank(checkpoint, (1, "up"))])
    configured(model, **changes)
    with pytest.raises(CheckpointError, match="transformers can't load"):
        write_globe(open_run(run), open_checkpoint(str(model)), tmp_path / "globe")
    assert not (tmp_path / "globe").exists()
