"""Parameters and bytes before and after, counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_runs import ATOM_RANK, ATOMS, RANK, random_bank, write_run

from globe.checkpoint import open_checkpoint
from globe.evaluation.sizes import Change, ModelSizes, measure_sizes
from globe.evaluation.subject import open_subject
from globe.hf.footprint import footprint
from globe.patch import parse, patch
from tiny_models import EXPERTS, HIDDEN, INTERMEDIATE

CPU = torch.device("cpu")
FAMILY = EXPERTS * INTERMEDIATE * HIDDEN
MATRIX_MEAN = INTERMEDIATE * HIDDEN
DENSE_ATOMS = EXPERTS * INTERMEDIATE * RANK + EXPERTS * ATOMS + ATOMS * RANK * HIDDEN
LOW_RANK = EXPERTS * INTERMEDIATE * RANK + EXPERTS * ATOMS + ATOMS * ATOM_RANK * (RANK + HIDDEN)


def payload(folder: Path) -> int:
    """Bytes of all tensors of a folder, from the lengths of its files and of their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        total += len(raw) - 8 - int.from_bytes(raw[:8], "little")
    return total


def sizes_of(model: str, against: str = "auto", dtype: torch.dtype = torch.float32) -> ModelSizes:
    subject, original = open_subject(model, against)
    loaded = subject.load(dtype=dtype, device=CPU, S_cache=0)
    dense = None if original is None else original.load(dtype=dtype, device=CPU, S_cache=None)
    return measure_sizes(subject, original, loaded, dense)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def made(
    request: pytest.FixtureRequest,
    checkpoint_of: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A run with dense atoms in one place and low-rank ones in another, and both checkpoints made from it."""
    from evaluation_support import VOCABULARY, write_tokenizer

    from tiny_models import write_tiny

    folder = tmp_path_factory.mktemp("sizes")
    source = write_tiny("qwen2_moe", folder / "source", dtype=request.param, vocab_size=VOCABULARY)
    write_tokenizer(source)
    checkpoint = open_checkpoint(str(source))
    banks = [
        random_bank(checkpoint, [(0, "up")], mean="matrix", dtype=request.param),
        random_bank(checkpoint, [(1, "gate")], low_rank=True, dtype=request.param),
    ]
    run = write_run(folder / "run", banks)
    for form in ("dense", "globe"):
        patch(parse([f"run={run}", f"out={folder / form}", f"format={form}"]))
    return {"source": source, "run": run, "dense": folder / "dense", "globe": folder / "globe"}


@pytest.mark.parametrize("form", ["run", "dense", "globe"])
def test_parameters_with_both_denominators(form: str, made: dict[str, Path]) -> None:
    sizes = sizes_of(str(made[form]))
    total = open_checkpoint(str(made["source"])).total_parameters
    kept = DENSE_ATOMS + MATRIX_MEAN + LOW_RANK
    assert sizes.places == ((0, "up"), (1, "gate"))
    assert sizes.family_parameters == Change(2 * FAMILY, kept)
    assert sizes.model_parameters == Change(total, total - 2 * FAMILY + kept)


@pytest.mark.parametrize("form", ["run", "dense", "globe"])
def test_bytes_are_those_in_the_files(form: str, made: dict[str, Path]) -> None:
    sizes = sizes_of(str(made[form]))
    width = open_checkpoint(str(made["source"])).reader.dtype("lm_head.weight").itemsize
    before = payload(made["source"])
    kept = (DENSE_ATOMS + MATRIX_MEAN + LOW_RANK) * width
    after = 2 * FAMILY * width if form == "dense" else kept
    assert sizes.family_bytes == Change(2 * FAMILY * width, after)
    assert sizes.model_bytes == Change(before, before - 2 * FAMILY * width + after)
    if form != "run":
        assert payload(made[form]) == sizes.model_bytes.after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_bytes_are_those_of_the_dtype_in_use(dtype: torch.dtype, made: dict[str, Path]) -> None:
    factored, dense = (sizes_of(str(made[form]), dtype=dtype) for form in ("globe", "dense"))
    width = dtype.itemsize
    all_experts = 2 * 3 * FAMILY * width
    assert dense.resident_original is not None
    assert dense.resident.experts == dense.resident_original.experts == all_experts
    kept = DENSE_ATOMS + MATRIX_MEAN + LOW_RANK
    assert factored.resident.factors == kept * width
    assert factored.resident.experts == all_experts - (2 * FAMILY - kept) * width
    assert factored.resident.rest == dense.resident.rest


def test_without_an_original_there_is_no_before(made: dict[str, Path]) -> None:
    sizes = sizes_of(str(made["globe"]), against="none")
    assert sizes.model_parameters.before is sizes.model_bytes.before is sizes.resident_original is None
    assert sizes.family_bytes is None
    assert sizes.family_parameters is not None  # what patching wrote beside it
    assert sizes.model_bytes.after == payload(made["globe"])
    assert sizes.model_parameters.ratio is None


def test_a_checkpoint_without_a_record_says_nothing_of_families(made: dict[str, Path]) -> None:
    sizes = sizes_of(str(made["source"]), against=str(made["source"]))
    assert sizes.places == ()
    assert sizes.family_parameters is sizes.family_bytes is None
    assert sizes.model_parameters.ratio == sizes.model_bytes.ratio == 1.0


def test_the_counts_of_patching_are_the_same(made: dict[str, Path]) -> None:
    record = json.loads((made["globe"] / "globe_patch.json").read_text())["parameters"]
    sizes = sizes_of(str(made["globe"]))
    assert sizes.family_parameters is not None
    assert sizes.family_parameters.ratio == pytest.approx(record["kept_of_families"])
    assert sizes.model_parameters.ratio == pytest.approx(record["kept_of_model"])


def test_composed_bases_count_when_they_are_there(made: dict[str, Path]) -> None:
    subject, _ = open_subject(str(made["globe"]), "none")
    model = subject.load(dtype=torch.float32, device=CPU, S_cache="all")
    assert footprint(model).cache == 0
    with torch.no_grad():
        model(torch.arange(30)[None])
    cache = measure_sizes(subject, None, model, None).resident.cache
    assert cache > 0
    assert cache % (RANK * HIDDEN * 4) == 0
