"""The dense output: byte for byte the original, but for the experts a bank stands for."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_runs import dense_experts, lossless_bank, random_bank, random_run, write_run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import globe.checkpoint.rewrite as rewrite
from globe.bank.file import read_artefact
from globe.checkpoint import Checkpoint, open_checkpoint
from globe.errors import ArtefactError, CheckpointError, ConfigError, GlobeError
from globe.hf.destination import RECORD
from globe.hf.model_card import CARD, RECIPE
from globe.patch import parse, patch
from tiny_models import write_tiny


def run_patch(run: Path, out: Path, *options: str) -> Path:
    patch(parse([f"run={run}", f"out={out}", *options]))
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def headers(folder: Path) -> dict[str, bytes]:
    """Header bytes of every weights file: names, dtypes, shapes, order, metadata."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        found[path.name] = data[: 8 + int.from_bytes(data[:8], "little")]
    return found


def others(folder: Path) -> dict[str, str]:
    """Hash of every file that holds no weights, but for our own note."""
    paths = [one for one in folder.rglob("*") if one.is_file() and one.suffix != ".safetensors"]
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in paths if one.name != RECORD}


def selected(run: Path, source: Path) -> set[str]:
    checkpoint = open_checkpoint(str(source))
    return {
        checkpoint.locate(member.layer, member.family, expert).tensor
        for folder in (run / "banks").iterdir()
        for member in read_artefact(folder).members
        for expert in member.experts
    }


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Several shards with an index, bf16, a tokenizer and a licence beside them; tied embeddings."""
    folder = write_tiny(
        "qwen2_moe",
        tmp_path / "source",
        dtype=torch.bfloat16,
        max_shard_size=24_000,
        tie_word_embeddings=True,
    )
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "LICENSE").write_text("of the original\n")
    return folder


def test_only_the_selected_tensors_differ_byte_for_byte(sharded: Path, tmp_path: Path) -> None:
    run = random_run(sharded, tmp_path / "run", ["up"], experts=[0, 2, 5])
    before = {path: path.read_bytes() for path in sharded.iterdir()}
    out = run_patch(run, tmp_path / "out")
    assert headers(out) == headers(sharded)
    written = {RECORD, CARD, RECIPE}
    assert {name: content for name, content in others(out).items() if name not in written} == others(sharded)
    assert {one.name for one in out.iterdir()} == {one.name for one in sharded.iterdir()} | written
    one, other = tensors(sharded), tensors(out)
    differ = {name for name in one if one[name].view(torch.int16).ne(other[name].view(torch.int16)).any()}
    assert differ == selected(run, sharded)
    assert len(differ) == 2 * 3  # layers, experts
    assert {path: path.read_bytes() for path in sharded.iterdir()} == before


def test_the_matrices_are_those_of_the_factors_in_the_dtype_of_the_file(
    sharded: Path, tmp_path: Path
) -> None:
    run = random_run(sharded, tmp_path / "run", mean="matrix")
    stored = tensors(run_patch(run, tmp_path / "out"))
    for folder in (run / "banks").iterdir():
        for (layer, family, expert), W in dense_experts(read_artefact(folder)).items():
            found = stored[f"model.layers.{layer}.mlp.experts.{expert}.{family}_proj.weight"]
            torch.testing.assert_close(found, W.to(torch.bfloat16), atol=0, rtol=2**-7)
            assert (found == W.to(torch.bfloat16)).float().mean() > 0.99  # rounded once, not twice


@pytest.mark.parametrize("upstream", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_lossless_bank_gives_the_same_bytes(upstream: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_tiny("qwen3_moe", tmp_path / "source", dtype=dtype, upstream=upstream)
    checkpoint = open_checkpoint(str(source))
    banks = [lossless_bank(checkpoint, (layer, one)) for layer in (0, 1) for one in ("gate", "up", "down")]
    out = run_patch(write_run(tmp_path / "run", banks), tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "gpt_oss"])
def test_twice_the_matrices_of_one_family_are_twice_as_large_and_of_the_other_not(
    model_type: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Own tensors, fused ones, and fused ones that are transposed and interleaved."""
    source = tiny(model_type)
    checkpoint = open_checkpoint(str(source))
    bank = lossless_bank(checkpoint, (1, "up"), gain=2.0)
    result = open_checkpoint(str(run_patch(write_run(tmp_path / "run", [bank]), tmp_path / "out")))
    for layer in (0, 1):
        for family in ("gate", "up", "down"):
            factor = 2 if (layer, family) == (1, "up") else 1
            before, after = (one.read_experts(layer, family).weights for one in (checkpoint, result))
            assert torch.equal(after, factor * before)


def test_the_shared_expert_is_replaced_where_the_bank_has_it(tmp_path: Path) -> None:
    source = write_tiny("qwen2_moe", tmp_path / "source", shared_expert_intermediate_size=20)
    bank = random_bank(open_checkpoint(str(source)), [(0, "gate")], experts=[1, 4, -1])
    stored = tensors(run_patch(write_run(tmp_path / "run", [bank]), tmp_path / "out"))
    W = dense_experts(bank)[0, "gate", -1].float()
    torch.testing.assert_close(stored["model.layers.0.mlp.shared_expert.gate_proj.weight"], W)


def test_one_bank_of_two_layers_and_both_families(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("olmoe")
    places = [(0, "up"), (0, "gate"), (1, "up")]
    bank = random_bank(open_checkpoint(str(source)), places, mean="scalar", low_rank=True)
    run = write_run(tmp_path / "run", [bank])
    stored = tensors(run_patch(run, tmp_path / "out"))
    for (layer, family, expert), W in dense_experts(bank).items():
        name = f"model.layers.{layer}.mlp.experts.{expert}.{family}_proj.weight"
        torch.testing.assert_close(stored[name], W.float(), atol=1e-6, rtol=1e-5)
    untouched = [name for name in stored if name not in selected(run, source)]
    original = tensors(source)
    assert all(torch.equal(stored[name], original[name]) for name in untouched)


def test_a_single_artefact_is_a_run_as_well(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    run = random_run(tiny("olmoe"), tmp_path / "run", ["up"])
    out = run_patch(run / "banks" / "layer001.up", tmp_path / "out")
    record = json.loads((out / RECORD).read_text())
    assert record["banks"] == {"layer001.up": ["layer 1 up"]}
    n, p, d, m, r = 6, 20, 24, 4, 13
    kept = n * p * r + m * r * d + n * m
    assert record["parameters"]["kept"] == kept
    assert record["parameters"]["kept_of_families"] == kept / (n * p * d)
    total = open_checkpoint(str(tiny("olmoe"))).total_parameters
    assert record["parameters"]["kept_of_model"] == (total - n * p * d + kept) / total


def test_metadata_of_a_strange_file_is_kept(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = write_tiny("olmoe", tmp_path / "source")
    save_file(tensors(source), source / "model.safetensors", metadata={"format": "pt", "made by": "me"})
    out = run_patch(random_run(source, tmp_path / "run", ["up"]), tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "me"}


# --- refused before anything is written -----------------------------------------------------------------------


@pytest.fixture
def refused(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., str]:
    """The sentence with which a run is refused, in both formats; nothing may be left behind."""

    def sentence(run: Path, kind: type[GlobeError], *options: str) -> str:
        texts = set()
        for form in ("dense", "globe"):
            before = sorted(path.name for path in tmp_path.iterdir())
            with pytest.raises(kind) as caught:
                run_patch(run, tmp_path / "out", f"format={form}", *options)
            assert sorted(path.name for path in tmp_path.iterdir()) == before
            text = str(caught.value)
            assert "\n" not in text
            texts.add(text)
        return " / ".join(sorted(texts))

    return sentence


def test_changed_weights_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    source = write_tiny("olmoe", tmp_path / "source")
    run = random_run(source, tmp_path / "run", ["up"])
    data = bytearray((source / "model.safetensors").read_bytes())
    checkpoint = Checkpoint(open_checkpoint(str(source))._source)
    entry = checkpoint.reader.entry(checkpoint.locate(1, "up", 3).tensor)
    data[entry.start] ^= 1  # one bit of one expert
    (source / "model.safetensors").write_bytes(data)
    assert "layer001.up was learned from other weights" in refused(run, ArtefactError)


def test_another_model_is_refused(
    refused: Callable[..., str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = random_run(tiny("olmoe"), tmp_path / "run", ["up"])
    text = refused(run, ArtefactError, f"model.path={tiny('mixtral')}")
    assert "learned from a olmoe" in text
    assert "model.path" in text
    larger = write_tiny("olmoe", tmp_path / "larger", hidden_size=36)
    assert "20 x 24" in refused(run, ArtefactError, f"model.path={larger}")
    shorter = write_tiny("olmoe", tmp_path / "shorter", num_hidden_layers=1)
    assert "layer 1 up" in refused(run, ArtefactError, f"model.path={shorter}") or "layer=1" in refused(
        run, ArtefactError, f"model.path={shorter}"
    )


@pytest.mark.parametrize("damage", ["bytes", "cut", "json", "version", "missing"])
def test_a_damaged_artefact_is_refused(
    damage: str, refused: Callable[..., str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = random_run(tiny("olmoe"), tmp_path / "run", ["up"])
    bank = run / "banks" / "layer001.up"
    data, record = bank / "bank.safetensors", bank / "globe.json"
    match damage:
        case "bytes":
            data.write_bytes(data.read_bytes()[:-1] + b"\x01")
        case "cut":
            data.write_bytes(data.read_bytes()[:-100])
        case "json":
            record.write_text(record.read_text()[:-20])
        case "version":
            record.write_text(record.read_text().replace('"format_version": 2', '"format_version": 4'))
        case "missing":
            data.unlink()
    assert "layer001.up" in refused(run, ArtefactError)


def test_a_run_without_banks_is_refused(
    refused: Callable[..., str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    assert "no finished bank" in refused(tmp_path / "nowhere", ArtefactError)
    run = random_run(tiny("olmoe"), tmp_path / "run", ["up"])
    for folder in list((run / "banks").iterdir()):
        folder.rename(folder.with_name(f"{folder.name}.partial"))
    assert "no finished bank" in refused(run, ArtefactError)


def test_two_banks_for_one_family_are_refused(
    refused: Callable[..., str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = random_run(tiny("olmoe"), tmp_path / "run", ["up"])
    shutil.copytree(run / "banks" / "layer001.up", run / "banks" / "twin")
    assert "both stand for layer 1 up" in refused(run, ArtefactError)


def test_a_bank_that_does_not_know_its_source_is_refused(
    refused: Callable[..., str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    bank = random_bank(open_checkpoint(str(tiny("olmoe"))), [(0, "up")])
    known = {key: value for key, value in bank.source.items() if key != "sha256"}
    run = write_run(tmp_path / "run", [replace(bank, source=known)])
    assert "does not say which tensors" in refused(run, ArtefactError)
    other = write_run(tmp_path / "other", [replace(bank, source={})])
    assert "give model.path" in refused(other, ArtefactError)


# --- the folder that is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "globe"])
def test_a_failure_midway_leaves_nothing(
    form: str, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = random_run(tiny("qwen2_moe"), tmp_path / "run")
    earlier = run_patch(run, tmp_path / "out", f"format={form}")
    kept = {path.name: path.read_bytes() for path in earlier.iterdir()}
    listed = sorted(path.name for path in tmp_path.iterdir())
    calls = 0

    def failing(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 15:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    if form == "dense":
        original = rewrite.raw_bytes
        monkeypatch.setattr(rewrite, "raw_bytes", failing)
    else:
        from globe.checkpoint.tensorfile import TensorFile

        original = TensorFile.read
        monkeypatch.setattr(TensorFile, "read", failing)
    for out, options in ((tmp_path / "fresh", []), (earlier, ["overwrite=true"])):
        calls = 0
        with pytest.raises((OSError, CheckpointError), match="No space left"):
            run_patch(run, out, f"format={form}", *options)
        assert calls > 15
        assert sorted(path.name for path in tmp_path.iterdir()) == listed
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == kept


def test_an_occupied_folder_is_refused_and_overwritten_only_on_demand(
    refused: Callable[..., str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    first = random_run(tiny("olmoe"), tmp_path / "first", ["up"])
    second = random_run(tiny("olmoe"), tmp_path / "second", ["gate"])
    out = tmp_path / "out"
    out.mkdir()
    run_patch(first, out)  # an empty folder is free
    assert "overwrite=true" in refused(second, ConfigError)
    run_patch(second, out, "overwrite=true")
    assert json.loads((out / RECORD).read_text())["banks"].keys() == {"layer000.gate", "layer001.gate"}
    (out / RECORD).unlink()
    assert "not written by globe.patch" in refused(second, ConfigError, "overwrite=true")
    shutil.rmtree(out)
    out.write_text("a file")
    assert "not a folder" in refused(second, ConfigError, "overwrite=true")
