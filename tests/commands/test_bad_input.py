"""Every wrong input ends in exactly one sentence that names what is wrong, and exit code 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from globe.config import commands as entry
from run_support import change_tensor, load, run_in, small_checkpoint

# what is typed, what the sentence must name, what it must say about a remedy
WRONG = [
    # composed by Hydra
    ("foo=1", "foo is not an option", "family, layer"),
    ("bank.foo=1", "bank.foo is not an option", "give one of m, r, atom_rank"),
    ("+foo=1", "foo is not an option", "family, layer"),
    ("bank.m=1e3", "bank.m", "integer or an expression"),
    ("bank.m=true", "bank.m", "integer or an expression"),
    ("family=null", "family", "needs a value"),
    ("bank.m=(n/4)", "bank.m=(n/4)", "key=value"),
    ("bank.m=sin(n/4)", "bank.m=sin(n/4)", "key=value"),
    ("bank=3", "bank=3", "bank.option=value"),
    ("family=side", "family=side", "up, gate, down, both"),
    ("device=tpu", "device=tpu", "auto, cpu, cuda, mps"),
    ("bank.activation=relu", "bank.activation=relu", "identity, silu, tanh, gelu"),
    ("train.steps=abc", "train.steps=abc", "give an integer"),
    ("train.steps=1.5", "train.steps=1.5", "give an integer"),
    ("train.momentum=fast", "train.momentum=fast", "give a number"),
    ("deterministic=perhaps", "deterministic=perhaps", "true or false"),
    ("wandb.tags=a", "wandb.tags", "give a list"),
    ("layer=4,12", "layer=4,12", "layer=[4,12]"),
    ("model=nosuch", "model=nosuch", "embedded"),
    ("experiment=nosuch", "experiment=nosuch", "smoke"),
    ("schedule=3", "schedule", "name of one of its files"),
    ("model=[1,2]", "group", "name of one of its files"),
    ("seed=${nowhere}", "seed", "nowhere"),
    ("family", "family", "key=value"),
    # out of range
    ("train.steps=0", "train.steps=0", "at least 1"),
    ("train.time_limit=-1", "train.time_limit", "above 0"),
    ("seed=-1", "seed=-1", "at least 0"),
    ("threads=0", "threads=0", "at least 1"),
    ("sweep=a/b", "sweep='a/b'", "without a slash"),
    ("codes.eta=2", "codes.eta", "at most 0.5"),
    ("codes.prune=1", "codes.prune", "below 1"),
    ("schedule.lam.start=2", "schedule.lam.start", "from 0 to 1"),
    ("schedule.temperature.end=0", "schedule.temperature.end", "positive"),
    ("model.max_experts=1", "model.max_experts=1", "at least 2"),
    ("bank.m=0", "bank.m=0", "at least 1"),
    ("bank.kept=1.5", "bank.kept=1.5", "at most 1"),
    ("bank.kept=0.5 bank.m=3 bank.atom_rank=2", "bank.kept=0.5", "leave out bank.m and bank.atom_rank"),
    ("budget.seconds=0", "budget.seconds", "positive"),
    ("bank.kept=0.01", "bank.kept=0.01", "give a share from 0.0"),
    ("bank.kept=0.5 codes.target_support=17", "codes.target_support=17", "at most 16"),
    ("method=nosuch", "method=nosuch", "mobe_corrected"),
    ("method=mobe bank.atom_rank=3", "bank.atom_rank", "method=mobe"),
    ("method=svd codes.target_support=2", "codes.target_support", "null with method=svd"),
    ("method=slbf bank.activation=gelu", "bank.activation", "silu, tanh"),
    ("method=mean_svd normalise.scale=row", "normalise.scale", "family or none"),
    ("method=mean_svd bank.scope=layers", "bank.scope", "family with method=mean_svd"),
    ("bank.scope=families", "bank.scope", "family=both"),
    ("bank.scope=all", "bank.scope=all", "family, families, layers"),
    ("bank.atom_rank=3 train.dictionary=mod", "train.dictionary", "dense atoms"),
    # wrong for this checkpoint
    ("layer=24", "layer=24", "0-23"),
    ("layer=first", "layer=first", "4-8"),
    ("layer=8-4", "layer=8-4", "0-23"),
    ("bank.m=n/5", "bank.m='n/5'", "give 3 or 4"),
    ("bank.m=17", "bank.m=17", "at most 16"),
    ("bank.m=p", "bank.m='p'", "n/4"),
    ("bank.r=49", "bank.r=49", "at most 48"),
    ("bank.r=11 bank.atom_rank=12", "bank.atom_rank=12", "at most 11"),
    ("bank.atom_rank=r/5", "bank.atom_rank='r/5'", "give 4 or 5"),
    ("bank.atom_rank=n/4", "bank.atom_rank='n/4'", "r/4"),
    ("bank.r=p/5", "bank.r='p/5'", "give 9 or 10"),
    ("codes.target_support=0", "codes.target_support=0", "at least 1"),
    ("model.include_shared=true bank.m=5", "model.include_shared", "false"),
    ("model.path=/no/such/folder", "model.path='/no/such/folder'", "hub id"),
    ("model.path=''", "model.path=''", "a folder"),
    ("model.path=org/not-in-the-cache", "org/not-in-the-cache", "folder"),
    ("device=mps", "device=mps", "device=cpu"),
]


def sentence_of(tmp_path: Path, *overrides: str) -> str:
    """What a user would read; fails when the run does not, or when the error is none of the user's."""
    try:
        run_in(tmp_path, *overrides)
    except Exception as error:
        if (sentence := entry.explain(error)) is None:
            raise
        return sentence
    pytest.fail("the run went through")


@pytest.mark.parametrize(("typed", "names", "remedy"), WRONG, ids=[typed for typed, _, _ in WRONG])
def test_one_sentence(tmp_path: Path, typed: str, names: str, remedy: str) -> None:
    sentence = sentence_of(tmp_path, *typed.split(" "))
    assert names in sentence
    assert remedy in sentence
    assert "\n" not in sentence
    assert not sentence.rstrip(".").endswith(":")
    for folder in tmp_path.iterdir():  # of the runs that came as far as having one
        assert load(folder / "status.json")["error"] == sentence


def test_the_list_is_long_enough() -> None:
    assert len({typed for typed, _, _ in WRONG}) >= 25


def test_cuda_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device=cuda is not available" in sentence_of(tmp_path, "device=cuda")


def test_a_checkpoint_with_broken_weights(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "model")
    name = "model.layers.2.mlp.experts.5.gate_proj.weight"
    change_tensor(checkpoint, name, lambda weight: weight / 0)
    sentence = sentence_of(tmp_path / "runs", f"model.path={checkpoint}", "layer=2", "family=gate")
    assert name in sentence


def test_a_checkpoint_that_is_cut_short(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "model")
    file = next(checkpoint.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    assert file.name in sentence_of(tmp_path / "runs", f"model.path={checkpoint}")


def test_a_checkpoint_without_a_config(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "model")
    (checkpoint / "config.json").unlink()
    assert "config.json" in sentence_of(tmp_path / "runs", f"model.path={checkpoint}")


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("bank.m=n/5", "bank.m='n/5' is 3.2 for n=16, not a whole number: give 3 or 4"),
        ("family=side", "family=side is not possible: give one of up, gate, down, both, all"),
        ("train.steps=0", "train.steps=0 is not possible: give an integer of at least 1"),
        ("output=/dev/null/x", "/dev/null/x/"),
    ],
)
def test_as_a_program_it_is_all_of_stderr(tmp_path: Path, typed: str, sentence: str) -> None:
    command = [sys.executable, "-m", "globe.train", typed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(sentence)
    assert done.stdout == ""
