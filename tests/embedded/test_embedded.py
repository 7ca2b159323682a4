"""The model and text inside the package: there from a checkout and from a wheel, and what the card says of it."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import globe.embedded
from globe.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[2]
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def test_every_file_is_there() -> None:
    assert sorted(path.name for path in globe.embedded.path().iterdir()) == sorted(FILES)
    assert 100_000 < globe.embedded.text_path().stat().st_size < 140_000
    assert 55_000 < globe.embedded.calibration_path().stat().st_size < 70_000
    assert (globe.embedded.path().parent / "MODEL_CARD.md").is_file()


def test_the_paths_cost_no_heavy_import() -> None:
    code = (
        "import sys, globe, globe.embedded; globe.embedded.path(); globe.embedded.text_path();"
        "assert 'extract_expert_weights' in dir(globe);"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_the_calibration_text_has_nothing_of_the_held_out_one() -> None:
    texts = [
        path.read_text(encoding="utf-8")
        for path in (globe.embedded.calibration_path(), globe.embedded.text_path())
    ]
    calibration, heldout = ("".join(text.lower().split()) for text in texts)
    runs = {heldout[start : start + 60] for start in range(len(heldout) - 59)}
    assert not any(calibration[start : start + 60] in runs for start in range(len(calibration) - 59))
    card = (globe.embedded.path().parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"{globe.embedded.calibration_path().stat().st_size:,} bytes" in card


def test_an_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="module 'globe' has no attribute 'absent'"):
        globe.absent  # noqa: B018


def test_the_card_tells_the_truth_about_sizes() -> None:
    card = (globe.embedded.path().parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    checkpoint = open_checkpoint(None)
    routed = 0
    for layer in checkpoint.moe_layers:
        for family in ("gate", "up", "down"):
            shape = checkpoint.shape(layer, family)
            routed += shape.n * shape.p * shape.d
    assert f"{checkpoint.total_parameters:,}" in card
    assert f"{routed:,}" in card


@pytest.mark.slow
def test_the_card_tells_the_truth_about_perplexity() -> None:
    """The whole way a user goes: tokenizer, model and text of the package, windows of 256 without overlap."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    card = (globe.embedded.path().parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    match = re.search(r"\| ([\d.]+) \(([\d,]+) tokens", card)
    assert match is not None
    model = AutoModelForCausalLM.from_pretrained(globe.embedded.path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(globe.embedded.path())
    text = globe.embedded.text_path().read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    assert len(tokens) == int(match[2].replace(",", ""))
    total, count = 0.0, 0
    with torch.no_grad():
        for window in tokens[: len(tokens) // 256 * 256].view(-1, 256).split(16):
            logits = model(window).logits[:, :-1].log_softmax(-1)
            total -= float(logits.gather(-1, window[:, 1:, None]).sum())
            count += window[:, 1:].numel()
    assert math.exp(total / count) == pytest.approx(float(match[1]), abs=0.3)


def test_what_git_tracks_is_enough_anywhere(tmp_path: Path) -> None:
    """The build takes what git does not ignore: those files of the package alone, in another place, must do."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "src/globe"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            target = tmp_path / Path(name).relative_to("src")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    code = (
        "import globe.embedded; from globe.checkpoint import known_model_types, open_checkpoint;"
        "print(globe.embedded.path(), open_checkpoint(None).shape(12, 'up').n, len(known_model_types()))"
    )
    # Without coverage's own variables: it would report the copy beside the package.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    environment = kept | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    where, experts, known = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path.resolve())
    tables = list((ROOT / "src/globe/checkpoint/architectures").glob("*.json"))
    assert (int(experts), int(known)) == (16, len(tables))
