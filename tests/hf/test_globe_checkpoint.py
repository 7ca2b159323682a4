"""The compact checkpoint: what it holds, how it loads, and that nothing loads it by mistake."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import dense_experts, lossless_bank, put_dense, random_bank, random_run, write_run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import globe
from globe.bank.file import BankArtefact, read_artefact
from globe.checkpoint import open_checkpoint
from globe.errors import ArtefactError, CheckpointError, ConfigError
from globe.hf import load, patch_model
from globe.hf.experts import GlobeExperts
from globe.hf.quantizer import unify_dtype
from globe.patch import parse, patch
from tiny_models import VOCABULARY, load_tiny, write_tiny

IDS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
SOURCE = Path(globe.__file__).parents[1]


def write(run: Path, out: Path, *options: str) -> Path:
    patch(parse([f"run={run}", f"out={out}", "format=globe", *options]))
    return out


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def reference(source: Path, run: Path, model_type: str = "qwen2_moe", **options: Any) -> nn.Module:
    model = load_tiny(source, model_type, **options)
    for folder in sorted((run / "banks").iterdir()):
        put_dense(model, dense_experts(read_artefact(folder)))
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def factor_names(folder: Path) -> set[str]:
    return {name for name in tensors(folder) if "globe" in name}


Banks = Callable[[Any], list[BankArtefact]]
CASES: dict[str, Banks] = {
    "one family of one layer": lambda c: [random_bank(c, [(1, "up")])],
    "gate alone": lambda c: [random_bank(c, [(layer, "gate")], seed=layer) for layer in (0, 1)],
    "some experts": lambda c: [
        random_bank(c, [(0, "up")], experts=[0, 2, 3]),
        random_bank(c, [(0, "gate")], experts=[5, 1], seed=1),
    ],
    "other sizes in every layer": lambda c: [
        random_bank(c, [(0, "up")], m=2, r=17),
        random_bank(c, [(1, "up")], m=5, r=9, seed=1),
    ],
    "other activations": lambda c: [
        random_bank(c, [(0, "up")], activation="tanh", lam=1.0),
        random_bank(c, [(0, "gate")], activation="gelu", lam=0.3, seed=1),
        random_bank(c, [(1, "up")], activation="identity", lam=1.0, seed=2),
        random_bank(c, [(1, "gate")], lam=0.0, seed=3),
    ],
    "low-rank atoms": lambda c: [random_bank(c, [(0, "up")], low_rank=True), random_bank(c, [(0, "gate")])],
    "scalar mean": lambda c: [random_bank(c, [(1, "up")], mean="scalar", experts=[0, 1, 4])],
    "mean expert": lambda c: [random_bank(c, [(1, "gate")], mean="matrix", lam=0.0)],
    "a bank of gate and up": lambda c: [random_bank(c, [(0, "gate"), (0, "up")], mean="matrix")],
    "a bank of all layers": lambda c: [
        random_bank(c, [(0, "up"), (1, "up")], mean="scalar", low_rank=True),
        random_bank(c, [(1, "gate")], seed=1),
    ],
    "down alone": lambda c: [random_bank(c, [(1, "down")], mean="scalar")],
    "down of some experts": lambda c: [
        random_bank(c, [(0, "down")], experts=[0, 2, 3], mean="matrix"),
        random_bank(c, [(1, "up")], seed=1),
    ],
    "a bank of all three families": lambda c: [
        random_bank(c, [(0, "gate"), (0, "up"), (0, "down")], mean="scalar", low_rank=True)
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_partial_and_mixed_compression(case: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("qwen2_moe")
    banks = CASES[case](open_checkpoint(str(source)))
    run = write_run(tmp_path / "run", banks)
    expected = logits(reference(source, run))
    assert (expected - logits(load_tiny(source, "qwen2_moe"))).abs().max() > 1e-3

    out = write(run, tmp_path / "out")
    for S_cache in (0, 2, "all"):
        torch.testing.assert_close(logits(load(out, S_cache=S_cache)), expected, atol=1e-5, rtol=0)
    patched = patch_model(load_tiny(source, "qwen2_moe"), run, S_cache=1)
    torch.testing.assert_close(logits(patched), expected, atol=1e-5, rtol=0)
    back = patch_model(load_tiny(source, "qwen2_moe"), run, dense=True)
    torch.testing.assert_close(logits(back), expected, atol=1e-5, rtol=0)

    served = {member.layer for bank in banks for member in bank.members}
    replaced = [module for module in patched.modules() if isinstance(module, GlobeExperts)]
    assert len(replaced) == len(served)
    # what the files hold: the original without gate and up of the layers served, without down where a bank serves it,
    # and the factors once
    kept = set(tensors(out)) - factor_names(out)
    gone = {
        f"layers.{layer}.mlp.experts.{e}.{f}_proj"
        for layer in served
        for e in range(6)
        for f in ("gate", "up")
    } | {
        f"layers.{member.layer}.mlp.experts.{e}.down_proj"
        for bank in banks
        for member in bank.members
        if member.family == "down"
        for e in range(6)
    }
    original = set(tensors(source))
    assert kept == {name for name in original if not any(part in name for part in gone)}
    atoms = [name for name in factor_names(out) if name.endswith((".atoms", ".left"))]
    assert len(atoms) == len(banks)

    loaded = load(out)
    loaded.save_pretrained(tmp_path / "again")
    first, again = tensors(out), tensors(tmp_path / "again")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)
    torch.testing.assert_close(logits(loaded.dequantize()), expected, atol=1e-5, rtol=0)


def test_lossless_banks_leave_logits_unchanged_in_all_outputs(tmp_path: Path) -> None:
    source = write_tiny("qwen3_moe", tmp_path / "source")
    checkpoint = open_checkpoint(str(source))
    banks = [lossless_bank(checkpoint, (layer, one)) for layer in (0, 1) for one in ("gate", "up", "down")]
    run = write_run(tmp_path / "run", banks)
    expected = logits(load_tiny(source, "qwen3_moe"))
    patch(parse([f"run={run}", f"out={tmp_path / 'dense'}"]))
    models = [
        load(tmp_path / "dense"),
        load(write(run, tmp_path / "globe")),
        patch_model(load_tiny(source, "qwen3_moe"), run),
        patch_model(load_tiny(source, "qwen3_moe"), run, dense=True),
    ]
    for model in models:
        torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", ["up", "gate", "down"])
def test_doubling_up_or_down_doubles_the_output_of_the_experts_and_doubling_gate_does_not(
    family: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny("mixtral")
    run = write_run(tmp_path / "run", [lossless_bank(open_checkpoint(str(source)), (1, family), gain=2.0)])
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    index, weight = torch.tensor([[0, 3], [5, 1]]).repeat(4, 1)[:7], torch.rand(7, 2)
    name = "model.layers.1.mlp.experts"
    with torch.no_grad():
        before = load_tiny(source, "mixtral").get_submodule(name)(x, index, weight)
        for model in (load(write(run, tmp_path / "out")), patch_model(load_tiny(source, "mixtral"), run)):
            after = model.get_submodule(name)(x, index, weight)
            assert torch.allclose(after, 2 * before, atol=1e-6) == (family != "gate")
            assert (after - before).abs().max() > 1e-3


def test_the_shared_expert_of_a_bank_is_written_reconstructed(tmp_path: Path) -> None:
    source = write_tiny("qwen2_moe", tmp_path / "source", shared_expert_intermediate_size=20)
    bank = random_bank(open_checkpoint(str(source)), [(0, "gate")], experts=[1, 4, -1], mean="scalar")
    run = write_run(tmp_path / "run", [bank])
    expected = reference_with_shared(source, bank)
    out = write(run, tmp_path / "out")
    torch.testing.assert_close(logits(load(out)), expected, atol=1e-5, rtol=0)
    for dense in (False, True):
        model = patch_model(load_tiny(source, "qwen2_moe"), run, dense=dense)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


def reference_with_shared(source: Path, bank: BankArtefact) -> Tensor:
    model = load_tiny(source, "qwen2_moe")
    experts = dense_experts(bank)
    shared = experts.pop((0, "gate", -1))
    put_dense(model, experts)
    with torch.no_grad():
        model.model.layers[0].mlp.shared_expert.gate_proj.weight.copy_(shared)
    return logits(model)


def test_shards_are_no_larger_than_the_originals(tmp_path: Path) -> None:
    source = write_tiny("qwen2_moe", tmp_path / "source", dtype=torch.bfloat16, max_shard_size=24_000)
    run = random_run(source, tmp_path / "run", dtype=torch.float32)
    out = write(run, tmp_path / "out")
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) < 1.2 * largest
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {tensor.dtype for path in out.glob("*.safetensors") for tensor in load_file(path).values()} == {
        torch.bfloat16
    }
    assert set(index["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
    model, exact = load(out), reference(source, run, dtype=torch.float32)
    assert model.dtype == torch.bfloat16
    error = (logits(model).float() - logits(exact)).norm() / logits(exact).norm()
    assert error < 0.05


def test_dtype_device_map_and_generation(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("qwen2_moe")
    run = random_run(source, tmp_path / "run")
    out = write(run, tmp_path / "out")
    expected = reference(source, run)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = expected.generate(IDS, **options)
    for S_cache in (0, "all"):
        model = load(out, S_cache=S_cache, device_map={"": "cpu"})
        assert torch.equal(model.generate(IDS, **options), tokens)
    half = load(out, dtype=torch.bfloat16)
    assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
    assert half.generate(IDS, **options).shape == tokens.shape
    rough = logits(half).float()
    assert (rough - logits(expected)).norm() / logits(expected).norm() < 0.05
    patched = patch_model(load_tiny(source, "qwen2_moe"), run, dtype=torch.bfloat16)
    experts = patched.model.layers[0].mlp.experts
    assert experts.globe_up.adapters.dtype == torch.bfloat16


def test_weights_offloaded_to_disk(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Hooks bring the weights of a module when it is called, so every parameter has to be used in a call."""
    from accelerate import disk_offload

    source = tiny("qwen2_moe")
    checkpoint = open_checkpoint(str(source))
    banks = [
        random_bank(checkpoint, [(0, "up"), (1, "up")]),
        random_bank(checkpoint, [(0, "gate")], mean="matrix"),
    ]
    run = write_run(tmp_path / "run", banks)
    model = load(write(run, tmp_path / "out"))
    expected = logits(model)
    disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    assert all(one.device.type == "meta" for one in model.parameters())
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)


def test_training_a_loaded_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(write(random_run(tiny("olmoe"), tmp_path / "run"), tmp_path / "out")).train()
    optimiser = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        grads = {name: one.grad for name, one in model.named_parameters() if ".globe_" in name}
        assert all(grad is not None and bool(grad.any()) for grad in grads.values())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():  # the cache follows the last step
        evaluated = float(model.eval()(input_ids=IDS, labels=IDS, use_cache=False).loss)
    assert evaluated < losses[-1]


# --- nothing loads it by mistake ------------------------------------------------------------------------------


def python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


LOADS = f"""
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.randint(1, {VOCABULARY}, (2, 9), generator=torch.Generator().manual_seed(3))
expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    difference = float((model(input_ids=ids, use_cache=False).logits - expected).abs().max())
print(type(model.model.layers[0].mlp.experts).__name__, difference < 1e-5)
"""


def compact_with_logits(source: Path, folder: Path) -> tuple[Path, Path]:
    out = write(random_run(source, folder / "run"), folder / "out")
    torch.save(logits(load(out)), folder / "logits.pt")
    return out, folder / "logits.pt"


def test_without_globe_loading_stops_and_with_it_plain_transformers_loads(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """By an Auto class and by the model class itself: never random experts."""
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, Qwen2MoeForCausalLM
for kind in (AutoModelForCausalLM, Qwen2MoeForCausalLM):
    try:
        kind.from_pretrained(sys.argv[1])
        print("LOADED", kind.__name__)
    except ValueError as error:
        print("STOPPED", kind.__name__, str(error)[:90].replace(chr(10), " "))
assert "globe" not in sys.modules
import globe
"""
    done = python(code + LOADS, *compact_with_logits(tiny("qwen2_moe"), tmp_path))
    assert done.returncode == 0, done.stderr
    auto, explicit, loaded = done.stdout.strip().splitlines()
    assert auto.startswith("STOPPED AutoModelForCausalLM")
    assert "globe_qwen2_moe" in auto
    assert explicit.startswith("STOPPED Qwen2MoeForCausalLM")
    assert loaded == "GlobeExperts True"


@pytest.mark.slow
def test_importing_globe_before_transformers_is_enough(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    code = "import globe, sys, torch\nassert 'transformers' not in sys.modules\n"
    code += "from transformers import AutoModelForCausalLM\n"
    done = python(code + LOADS, *compact_with_logits(tiny("qwen2_moe"), tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "GlobeExperts True"


def test_importing_globe_imports_neither_torch_nor_transformers() -> None:
    done = python("import sys, globe; print([n for n in ('torch', 'transformers') if n in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_a_compact_checkpoint_that_lacks_a_factor_stops(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    out = write(random_run(tiny("qwen2_moe"), tmp_path / "run"), tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    victim = "model.layers.1.mlp.experts.globe_up.adapters"
    save_file({k: v for k, v in stored.items() if k != victim}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.globe_up\.adapters"):
        load(out)


def test_another_version_of_the_format_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    out = write(random_run(tiny("olmoe"), tmp_path / "run"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["globe_version"] = 4
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match="globe_version=4"):
        load(out)
    config["quantization_config"] |= {"globe_version": 1, "banks": [{"m": 3}]}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match="malformed"):
        load(out)


def test_impossible_options_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    run = random_run(tiny("olmoe"), tmp_path / "run")
    with pytest.raises(ConfigError, match="S_cache=-1"):
        write(run, tmp_path / "out", "S_cache=-1")
    assert not (tmp_path / "out").exists()
    out = write(run, tmp_path / "out", "S_cache=3")
    model = load(out)
    assert model.model.layers[0].mlp.experts.globe_up.cache.capacity == 3
    with pytest.raises(ConfigError, match="S_cache='some'"):
        load(out, S_cache="some")
    with pytest.raises(CheckpointError, match="neither a checkpoint folder"):
        load(tmp_path / "nowhere")


def test_an_ordinary_checkpoint_loads_as_always(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("olmoe"), S_cache=2)
    torch.testing.assert_close(logits(model), logits(load_tiny(tiny("olmoe"), "olmoe")))


def test_a_model_is_compressed_once(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    run = random_run(tiny("olmoe"), tmp_path / "run")
    model = patch_model(load_tiny(tiny("olmoe"), "olmoe"), run)
    expected = logits(model)
    with pytest.raises(ArtefactError, match="compressed already"):
        patch_model(model, run)
    again = patch_model(model.dequantize(), run)
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)


def test_a_copy_of_a_model_is_a_model_of_its_own(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    bank = random_bank(open_checkpoint(str(tiny("olmoe"))), [(0, "up"), (1, "up")])
    model = patch_model(load_tiny(tiny("olmoe"), "olmoe"), write_run(tmp_path / "run", [bank]))
    expected = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.globe_banks["bank0"].atoms.zero_()
    torch.testing.assert_close(logits(twin), expected)
    assert (logits(model) - expected).abs().max() > 1e-3  # the bank of both layers is one


def test_dtypes_that_loading_left_alone_are_made_one(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Versions of transformers before 5.22 leave tensors they convert in the dtype of the file."""
    model = patch_model(load_tiny(tiny("mixtral"), "mixtral"), random_run(tiny("mixtral"), tmp_path / "run"))
    expected = logits(model)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.double()
        layer.mlp.experts.down_proj.data = layer.mlp.experts.down_proj.data.double()
    model.config.dtype = torch.float32
    unify_dtype(model)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), expected)


def test_a_bank_of_another_model_leaves_the_model_in_memory_alone(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = random_run(tiny("olmoe"), tmp_path / "run")
    with pytest.raises(ArtefactError, match="learned from a olmoe"):
        patch_model(load_tiny(tiny("mixtral"), "mixtral"), run)
    wide = write_tiny("olmoe", tmp_path / "wide", intermediate_size=32)
    model = load_tiny(wide, "olmoe")
    before = logits(model)
    with pytest.raises(ArtefactError, match="20 x 24"):
        patch_model(model, run)
    torch.testing.assert_close(logits(model), before)
    few = write_tiny("olmoe", tmp_path / "few", num_experts=5)
    with pytest.raises(ArtefactError, match="has 5 of"):
        patch_model(load_tiny(few, "olmoe"), run)


def test_small_dense_experts_in_half_precision_run(tmp_path: Path) -> None:
    """Rows of 20 numbers are no multiple of 16 bytes in bfloat16, as a grouped product needs."""
    small = load_tiny(write_tiny("qwen2_moe", tmp_path / "float"), "qwen2_moe")
    small.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    run = write_run(tmp_path / "run", [random_bank(open_checkpoint(str(tmp_path / "half")), [(1, "up")])])
    model = load(write(run, tmp_path / "out"))
    assert model.dtype == torch.bfloat16
    assert model.config._experts_implementation == "eager"
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, IDS.shape[1] + 2)
    assert load(tmp_path / "out", dtype=torch.float32).config._experts_implementation != "eager"


def test_small_dense_experts_that_lie_transposed_run(tmp_path: Path) -> None:
    """Checkpoints of gpt_oss could not be looked at after patching: the columns of down are its inputs there."""
    write_tiny("gpt_oss", tmp_path / "half", dtype=torch.bfloat16)
    model = load(tmp_path / "half", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, IDS.shape[1] + 2)


def test_aligned_dense_experts_keep_the_grouped_product(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [random_bank(open_checkpoint(None), [(12, "up")])])
    model = load(write(run, tmp_path / "out"))
    assert model.dtype == torch.bfloat16
    assert model.config._experts_implementation != "eager"
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, IDS.shape[1] + 2)
