"""Files of a user that would take hours or all memory to read end in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from globe.config.commands import explain
from globe.config.composition import conf_dir, plain, register
from globe.config.plain_yaml import MOST_VALUES, read_yaml

GLOBAL = "# @package _global_\n"
LAUGHS = "a: &0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"b{k}: &{k} [{', '.join([f'*{k - 1}'] * 9)}]\n" for k in range(1, 10)
)
BAD = {
    "laughs": (LAUGHS, "more than 10,000 values"),
    "in itself": ("train: &t\n  steps: *t\n", "stands within what it stands for"),
    "deep": (f"layer: {'[' * 10**5}", "nested more than 64 deep"),
    "many values": (f"layer: [{'1,' * MOST_VALUES}1]\n", "more than 10,000 values"),
    "interpolations": (f"output: '{'${' * 5000}x{'}' * 5000}'\n", "more than 100 interpolations"),
    "large": ("# nothing\n" * 10**6, "more than 262,144 bytes"),
}


def composed(folder: Path, text: str, *overrides: str) -> object:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(GLOBAL + text)
    register()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        search = f"hydra.searchpath=[file://{folder}]"
        return plain(compose("config", overrides=[search, "experiment=mine", *overrides]))


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_or_becomes_large_is_refused(tmp_path: Path, name: str) -> None:
    text, reason = BAD[name]
    with pytest.raises(ValueError, match=reason) as caught:
        composed(tmp_path, text)
    sentence = explain(caught.value)
    assert sentence is not None
    assert "mine.yaml" in sentence
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f"output: '{'${sweep}' * 40}'\nsweep: '{'${wandb.project}' * 40}'\n",
            "more than 1,000 interpolations",
        ),
        (f"output: '{'${sweep}' * 40}'\nsweep: '{'x' * 5000}'\n", "more than 65,536 characters"),
        ("output: ${sweep}\nsweep: ${output}\n", "output"),
    ],
)
def test_interpolations_that_explode_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # OmegaConf has a class for each
        composed(tmp_path, text)
    sentence = explain(caught.value)
    assert sentence is not None
    assert reason in sentence


def test_aliases_and_interpolations_of_a_reasonable_file_are_read(tmp_path: Path) -> None:
    text = "bank: &b\n  m: 3\n  r: 7\nlayer: [&l 4, *l]\nsweep: ${output}-${bank.m}\noutput: here\n"
    read = composed(tmp_path, text, "train.steps=2")
    assert read["bank"]["m"] == 3
    assert read["layer"] == [4, 4]
    assert read["sweep"] == "here-3"
    (tmp_path / "config.yaml").write_text(text)
    assert read_yaml(tmp_path / "config.yaml") == OmegaConf.to_container(OmegaConf.create(text))
