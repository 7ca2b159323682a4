"""The embedded model and its dense compression in tools that know nothing of GloBE, in bfloat16."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_runs import random_bank, write_run

import globe.embedded
from globe.checkpoint import open_checkpoint
from globe.patch import parse, patch

PROMPT = "And it came to pass in those days, that"
TASK = """\
task: held_out_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{given}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
QUESTIONS = (
    (PROMPT, [" he said unto them", " compiler network bug"], 0),
    ("And the LORD said unto", [" window hackers the the", " Moses"], 1),
    ("My dear Miss", [" Bennet", " thou begat"], 0),
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with the up matrices of one layer replaced, written as every engine reads it."""
    folder = tmp_path_factory.mktemp("stock")
    run = write_run(folder / "run", [random_bank(open_checkpoint(None), [(12, "up")])])
    patch(parse([f"run={run}", f"out={folder / 'dense'}", "format=dense"]))
    return folder / "dense"


def test_engines_take_its_sizes() -> None:
    """Grouped products want rows of whole 16 bytes, and kernels of attention heads of 32 dimensions or more."""
    config = json.loads((globe.embedded.path() / "config.json").read_text())
    for size in ("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        assert config[size] % 16 == 0, size
    assert config["moe_intermediate_size"] % 4 == 0  # p/2, p/4 and 3p/4 are sizes of a bank
    assert config["hidden_size"] // config["num_attention_heads"] in (32, 64, 128)
    assert config["num_attention_heads"] % 2 == 0  # for tensor parallelism over two devices
    assert not config["norm_topk_prob"]  # llama.cpp and SGLang read neither of these from a qwen2_moe
    assert not config["tie_word_embeddings"]


@pytest.mark.parametrize("which", ["embedded", "dense"])
def test_a_pipeline_writes_in_bfloat16(which: str, dense: Path) -> None:
    from transformers import pipeline

    path = {"embedded": globe.embedded.path(), "dense": dense}[which]
    writer = pipeline("text-generation", model=str(path), dtype=torch.bfloat16, device="cpu")
    assert writer.model.dtype == torch.bfloat16
    assert writer.model.config._experts_implementation == "grouped_mm"
    (written,) = writer(PROMPT, max_new_tokens=5, do_sample=False)
    assert written["generated_text"].startswith(PROMPT)
    assert len(written["generated_text"]) > len(PROMPT) + 5
    ids = torch.tensor([writer.tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        half, full = writer.model(ids).logits.float(), writer.model.float()(ids).logits
    assert float((half - full).norm() / full.norm()) < 0.05


@pytest.mark.slow
def test_lm_eval_measures_it_by_its_own_command(dense: Path, tmp_path: Path) -> None:
    """Needs the extra `eval`."""
    pytest.importorskip("lm_eval")
    rows = [json.dumps({"given": given, "choices": words, "answer": at}) for given, words, at in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "task.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    for path in (globe.embedded.path(), dense):
        out = tmp_path / path.name
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "2"]
        command += ["--model_args", f"pretrained={path},dtype=bfloat16", "--output_path", str(out)]
        command += ["--tasks", "held_out_words", "--include_path", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = out.rglob("results_*.json")
        found = json.loads(file.read_text())["results"]["held_out_words"]["acc,none"]
        assert found == 1 or path == dense
