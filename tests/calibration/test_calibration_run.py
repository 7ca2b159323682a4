"""The pass over a model: equal to the whole model's, resumed after a kill, bounded, and refused with reasons."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_support import collect, make, output_information
from safetensors.torch import load_file, save_file

from globe.calibration import run as run_module
from globe.calibration.hidden_states import HiddenStates
from globe.calibration.run import RECORD, Calibration, calibrate, prepare
from globe.checkpoint import open_checkpoint
from globe.config.calibrate_options import CalibrateConfig
from globe.config.choices import ExportDtype
from globe.errors import ArtefactError, CheckpointError, ConfigError
from tiny_models import TINY, load_tiny


def same(one: Calibration, other: Calibration, layers: tuple[int, ...]) -> None:
    for layer in layers:
        for name in ("file", "output_file"):
            assert getattr(one, name)(layer).read_bytes() == getattr(other, name)(layer).read_bytes()
    assert not list(one.folder.rglob("hidden-*.bin"))


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_layer_by_layer_gives_what_the_whole_model_gives(model_type: str, tmp_path: Path) -> None:
    checkpoint, options = make(tmp_path, model_type)
    options.gradient_tokens = 2 * 13
    calibration = calibrate(checkpoint, options)
    model = load_tiny(checkpoint.folder, model_type)
    request = prepare(checkpoint, options)
    assert request.windows.shape == (11, 13)
    assert request.gradient_windows.shape == (2, 13)
    whole = collect(model, request.windows, batch=4)
    assert tuple(whole) == checkpoint.moe_layers
    for layer, want in output_information(model, request.gradient_windows).items():
        output = calibration.layer(layer).output
        assert output is not None
        scale = float(want.diagonal().mean())
        assert scale > 0
        torch.testing.assert_close(output.F.double() / scale, want / scale, rtol=1e-5, atol=1e-5)
        down = checkpoint.read_experts(layer, "down").weights.double()
        energies = ((down @ want) * down).sum(2) / down.square().sum(2)
        torch.testing.assert_close(output.down.double() / scale, energies / scale, rtol=1e-4, atol=1e-5)
    for layer, want in whole.items():
        got = calibration.layer(layer)
        for name in ("C", "H", "counts", "gate2", "rows_up", "rows_gate", "reap"):
            first, second = getattr(got, name), getattr(want, name)
            if second is not None:
                torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    left = {one.name for one in calibration.folder.iterdir()}
    files = {
        one(layer).name
        for layer in checkpoint.moe_layers
        for one in (calibration.file, calibration.output_file)
    }
    assert left == {RECORD, ".lock"} | files


class Killed(BaseException):
    """Ends a pass as a kill would: nothing of ours handles it."""


@pytest.mark.slow
def test_a_pass_that_ends_at_any_moment_goes_on_to_the_same_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, options = make(tmp_path)
    options.batch, options.gradient_tokens = 6, 13
    want = calibrate(checkpoint, options)
    layers = checkpoint.moe_layers
    assert len(layers) == 2
    options.out = str(tmp_path / "again")
    moments: list[str] = []
    left = -1

    def watch(owner: Any, name: str) -> None:
        """Count calls, and end at one of them, before or after its work."""
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            for when in ("before", "after"):
                if when == "after":
                    result = original(*args, **kwargs)
                moments.append(f"{when} {name}")
                left -= 1
                if left == 0:
                    raise Killed
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(run_module.Decoder, "step")
    watch(run_module, "write_statistics")
    watch(run_module, "write_output")
    watch(run_module.Decoder, "logits")
    watch(run_module, "write_json")
    watch(HiddenStates, "create")
    watch(HiddenStates, "commit")
    watch(HiddenStates, "_remove")
    watch(HiddenStates, "clear")
    calibrate(checkpoint, options)
    total = len(moments)
    assert total > 25
    for moment in range(1, total + 1):
        shutil.rmtree(options.out)
        left = moment
        with pytest.raises(Killed):
            calibrate(checkpoint, options)
        left, before = -1, len(moments)
        same(calibrate(checkpoint, options), want, layers)
        if moment > total // 2:  # what was done is not done again
            assert len(moments) - before < total
        left = -1


@pytest.mark.slow
def test_a_killed_process_resumes(tmp_path: Path) -> None:
    checkpoint, options = make(tmp_path, num_hidden_layers=6)
    want = calibrate(checkpoint, options)
    options.out = str(tmp_path / "killed")
    code = (
        "import sys, time; from globe.calibration import run; from globe.checkpoint import open_checkpoint\n"
        "from globe.config.calibrate_options import CalibrateConfig\n"
        "step = run.Decoder.step\n"
        "def slow(*args): time.sleep(0.05); return step(*args)\n"
        "run.Decoder.step = slow\n"
        "text, out, folder = sys.argv[1:]\n"
        "run.calibrate(open_checkpoint(folder), "
        "CalibrateConfig(text=text, tokens=143, window=13, batch=4, out=out))\n"
    )
    arguments = [sys.executable, "-c", code, str(options.text), str(options.out), str(checkpoint.folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(arguments, env=environment)
    folder = Path(options.out)
    until = time.monotonic() + 120
    while not list(folder.glob("layer-001.safetensors")) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (folder / "progress.json").is_file()
    assert not (folder / "layer-005.safetensors").exists()
    same(calibrate(checkpoint, options), want, checkpoint.moe_layers)


@pytest.mark.parametrize(
    ("model_type", "head", "other"),
    [
        ("qwen3_moe", "model.", ""),
        ("qwen3_moe", "model.", "model.model."),
        ("qwen3_5_moe_text", "model.", "model.language_model."),
        ("dbrx", "transformer.", ""),
        ("nemotron_h", "backbone.", "model.backbone."),
    ],
)
def test_names_of_another_beginning_give_the_same_statistics(
    model_type: str, head: str, other: str, tmp_path: Path
) -> None:
    checkpoint, options = make(tmp_path, model_type)
    want = calibrate(checkpoint, options)
    file = checkpoint.folder / "model.safetensors"
    tensors = load_file(file)
    renamed = {
        other + name.removeprefix(head) if name.startswith(head) else name: one.clone()
        for name, one in tensors.items()
    }
    assert set(renamed) != set(tensors)
    save_file(renamed, file, metadata={"format": "pt"})
    options.out = str(tmp_path / "again")
    again = open_checkpoint(str(checkpoint.folder))
    got = calibrate(again, options)
    assert again.moe_layers == checkpoint.moe_layers
    for layer in again.moe_layers:
        torch.testing.assert_close(got.layer(layer).C, want.layer(layer).C)
        assert torch.equal(got.layer(layer).counts, want.layer(layer).counts)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("attn_implementation", [[]], "transformers can't load"),
        ("hidden_act", "no such", "transformers can't load"),
        ("num_experts_per_tok", -1, "transformers can't run"),
    ],
)
def test_a_config_that_transformers_refuses_is_one_sentence(
    key: str, value: Any, sentence: str, tmp_path: Path
) -> None:
    checkpoint, options = make(tmp_path)
    file = checkpoint.folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=sentence):
        calibrate(open_checkpoint(str(checkpoint.folder)), options)


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    checkpoint, options = make(tmp_path)
    folder = Path(str(options.out))
    folder.mkdir()
    for name in (RECORD, "progress.json", "layer-001.safetensors"):
        (folder / f".{name}.globe-0123abcd").write_text("half")
    calibration = calibrate(checkpoint, options)
    assert not list(folder.glob(".*.globe-*"))
    assert calibration.layer(1).layer == 1


def test_only_the_layers_wanted_and_later_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, options = make(tmp_path, num_hidden_layers=3)
    want = calibrate(checkpoint, options)
    options.out = str(tmp_path / "parts")
    part = calibrate(checkpoint, options, layers=[1])
    assert part.has(0)
    assert part.has(1)
    assert not part.has(2)
    steps: list[int] = []
    original = run_module.Decoder.step
    monkeypatch.setattr(
        run_module.Decoder,
        "step",
        lambda self, layer, *rest: steps.append(layer) or original(self, layer, *rest),
    )
    same(calibrate(checkpoint, options), want, (0, 1, 2))
    assert set(steps) == {2}
    steps.clear()
    calibrate(checkpoint, options)
    assert not steps
    want.file(1).unlink()
    options.out = str(want.folder)
    same(calibrate(checkpoint, options), part, (0, 1))
    assert set(steps) == {0, 1}


def test_the_form_is_chosen_by_the_memory_given(tmp_path: Path) -> None:
    checkpoint, options = make(tmp_path, hidden_size=768, head_dim=32)
    whole = calibrate(checkpoint, options)
    plan = prepare(checkpoint, options).plan
    assert plan.rank is None
    options.memory = plan.memory / 1e9 - 0.02
    options.out = str(tmp_path / "low")
    request = prepare(checkpoint, options)
    assert request.plan.rank is not None
    assert request.plan.rank >= 8
    assert request.plan.memory <= options.memory * 1e9
    assert f"rank {request.plan.rank}" in request.plan.sentence
    low = calibrate(checkpoint, options)
    assert low.key != whole.key
    for layer in checkpoint.moe_layers:
        few, all_ = low.layer(layer), whole.layer(layer)
        assert torch.equal(few.rows_up, all_.rows_up)
        diagonals = (few.C.diagonal(dim1=1, dim2=2), all_.C.diagonal(dim1=1, dim2=2))
        torch.testing.assert_close(*diagonals, rtol=1e-4, atol=1e-6)
    options.memory = 1e-4
    with pytest.raises(ConfigError, match=r"calibrate\.memory=0\.0001 is too little .* at least \d"):
        prepare(checkpoint, options)


def test_bfloat16_and_a_cache_by_model_text_and_sizes(tmp_path: Path) -> None:
    checkpoint, options = make(tmp_path, dtype=torch.bfloat16)
    keys = set()
    for change in ({}, {"dtype": ExportDtype.bfloat16}, {"tokens": 26}, {"window": 14}):
        changed = CalibrateConfig(**{**vars(options), "out": None, **change})
        found = calibrate(checkpoint, changed, output=tmp_path / "outputs")
        keys.add(found.key)
        assert found.folder.parent == tmp_path / "outputs" / "calibration"
        assert found.folder.name.startswith("model_")
    assert len(keys) == 4
    assert len(list((tmp_path / "outputs" / "calibration").iterdir())) == 4
    path = checkpoint.folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: one + 0.5 for name, one in tensors.items()}, path, metadata={"format": "pt"})
    assert prepare(open_checkpoint(str(checkpoint.folder)), options).key not in keys


def test_what_cannot_be_done_is_said_in_a_sentence(tmp_path: Path) -> None:
    checkpoint, options = make(tmp_path)
    for change, message in (
        ({"text": None}, r"calibrate\.text=null"),
        ({"text": str(tmp_path / "absent")}, r"calibrate\.text=.*can't be read"),
        ({"window": 40}, r"calibrate\.window=40 is more than the 32 positions"),
        ({"tokenizer": str(tmp_path)}, "tokenizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrate(checkpoint, CalibrateConfig(**{**vars(options), **change}))
    short = tmp_path / "short.txt"
    short.write_text("abc")
    with pytest.raises(ConfigError, match=r"has 3 tokens, fewer than calibrate\.window=13"):
        calibrate(checkpoint, CalibrateConfig(**{**vars(options), "text": str(short)}))
    calibrate(checkpoint, options)
    options.tokens = 39
    with pytest.raises(ConfigError, match="holds something else, or the statistics of another"):
        calibrate(checkpoint, options)
    (tmp_path / "file").write_text("")
    options.out = str(tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="can't be used"):
        calibrate(checkpoint, options)


def test_a_damaged_file_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    checkpoint, options = make(tmp_path)
    calibration = calibrate(checkpoint, options)
    path = calibration.file(1)
    path.write_bytes(path.read_bytes()[:-9])
    assert not calibration.has(1)
    with pytest.raises(ArtefactError, match="calibrate again"):
        calibration.layer(1)
    calibrate(checkpoint, options)
    assert calibration.layer(1).layer == 1
