"""Small models of several architectures, compressed in ways that differ, with what transformers makes of them.

    python models.py FOLDER [CASE ...]      # in GloBE's environment

Writes FOLDER/CASE/globe (a compact checkpoint) and FOLDER/CASE/reference.json: greedy tokens, their
log-probabilities in float32, and the bytes of experts that each form should hold; of the embedded model dense and
dense.json too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from models_data import NEW_TOKENS, PROMPTS

import globe.embedded

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "qwen2_moe": (
        "qwen2_moe",
        {
            "moe_intermediate_size": 80,
            "shared_expert_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 2,
        },
        ["family=all", "bank.m=3", "bank.r=40"],
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"moe_intermediate_size": 80, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 32},
        [
            "family=both",
            "bank.scope=layers",
            "bank.m=6",
            "bank.r=40",
            "bank.atom_rank=9",
            "bank.activation=tanh",
        ],
    ),
    "mixtral": (
        "mixtral",
        {"intermediate_size": 80, "num_local_experts": 6, "num_experts_per_tok": 2},
        [
            "family=both",
            "bank.scope=families",
            "bank.m=4",
            "bank.r=40",
            "normalise.centre=expert_mean",
            "model.max_experts=4",
        ],
    ),
    "packed": (
        "qwen2_moe",
        {
            "moe_intermediate_size": 80,
            "shared_expert_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 2,
        },
        ["family=all", "bank.m=3", "bank.r=40", "bank.bits_A=3", "bank.bits_B=6"],
    ),
    "olmoe": (
        "olmoe",
        {"intermediate_size": 80, "num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 4},
        ["family=up", "bank.m=3", "bank.r=20", "normalise.centre=none"],
    ),
    "embedded": ("", {}, ["family=both", "bank.m=n/4", "bank.r=p/2"]),
}


def write(folder: Path, case: str) -> None:
    model_type, sizes, options = CASES[case]
    folder.mkdir(parents=True)
    if model_type:
        write_original(folder / "original", case, model_type, sizes)
    else:
        shutil.copytree(globe.embedded.path(), folder / "original")
    run = [
        f"model.path={folder / 'original'}",
        "layer=all",
        "train.steps=3",
        f"hydra.run.dir={folder / 'run'}",
        *options,
    ]
    command(["globe.train", *run])
    command(["globe.patch", f"run={folder / 'run'}", f"out={folder / 'globe'}", "format=globe", "S_cache=0"])
    (folder / "reference.json").write_text(json.dumps(reference(folder / "globe")))
    if case == "embedded":
        command(["globe.patch", f"run={folder / 'run'}", f"out={folder / 'dense'}", "format=dense"])
        (folder / "dense.json").write_text(json.dumps(reference(folder / "dense")))


def write_original(folder: Path, case: str, model_type: str, sizes: dict[str, Any]) -> None:
    """Write a model of random weights with the tokenizer of the embedded one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(len(case))
    config = AutoConfig.for_model(
        model_type, **{**SMALL, **sizes}, eos_token_id=None, bos_token_id=None, pad_token_id=None
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 if "embed" in name or "lm_head" in name else 0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(globe.embedded.path()) / name, folder / name)


def command(words: list[str]) -> None:
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)


@torch.no_grad()
def reference(folder: Path) -> dict[str, Any]:
    model = globe.load(folder, dtype=torch.float32)
    tokens, probabilities = [], []
    for prompt in PROMPTS:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[0, len(prompt) :]
        scores = torch.log_softmax(torch.cat(out.scores).float(), -1)
        tokens.append(new.tolist())
        probabilities.append(scores[range(len(new)), new].tolist())
    return {"tokens": tokens, "logprobs": probabilities, "bytes": expected_bytes(model)}


def expected_bytes(model: Any) -> dict[str, int]:
    """Bytes of the routed experts in float32: dense, with the bank resident, with composed bases instead."""
    from globe.hf.experts import GlobeExperts

    dense = bank = composed = 0
    atoms = set()
    for module in model.modules():
        if not isinstance(module, GlobeExperts):
            continue
        p, d = module.size
        dense += 3 * module.num_experts * p * d * 4
        own = sum(parameter.nbytes for parameter in module.parameters())
        bank += own
        composed += own
        for projection in module.projections.values():
            if projection.layout is None:
                continue
            composed -= projection.codes.nbytes
            composed += len(projection.row) * projection.layout.r * d * 4
            held = projection._shared[0] or projection.bank
            if projection._shared[0] is None:
                composed -= sum(parameter.nbytes for parameter in held.parameters())
            elif id(held) not in atoms:
                atoms.add(id(held))
                bank += sum(parameter.nbytes for parameter in held.parameters())
    return {"dense": dense, "bank": bank, "composed": composed}


if __name__ == "__main__":
    for name in sys.argv[2:] or CASES:
        write(Path(sys.argv[1]) / name, name)
