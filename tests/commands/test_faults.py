"""What machines do to a run: no memory, disks that fail, signals, figures out of range. One sentence, nothing lost."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

import globe.fit.one_bank
from globe.config.command_line import run_command
from globe.config.commands import explain, is_out_of_memory, start
from globe.config.composition import conf_dir, register
from globe.errors import FitError
from globe.numerics import chunks
from globe.patch import PatchOptions
from run_support import FakeFit, change_tensor, load, run_in, small_checkpoint

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
)


def install(monkeypatch: pytest.MonkeyPatch, fit: FakeFit) -> FakeFit:
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", fit)
    return fit


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError(ALLOCATOR), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_a_fit_that_runs_out_of_memory_goes_on_in_smaller_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    sizes = []

    def exhausted(fit: int, step: int) -> None:
        sizes.append(chunks.chunk_size(16, 1, 1, least=16))
        if fit == 0 and step == 2:
            raise error

    fit = install(monkeypatch, FakeFit(exhausted))
    _, folder = run_in(tmp_path, "train.steps=4", "train.checkpoint_every=0")
    assert fit.resumed_at == [None, 2], "from the last checkpoint"
    assert load(folder / "status.json")["state"] == "finished"
    whole = chunks.chunk_size(60, 88, 512)
    with chunks.halved_chunks(1):
        assert chunks.chunk_size(60, 88, 512) == (whole + 1) // 2
    assert chunks.chunk_size(60, 88, 512) == whole


def test_memory_that_no_smaller_chunk_cures_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(fit: int, step: int) -> None:
        raise RuntimeError(ALLOCATOR)

    fit = install(monkeypatch, FakeFit(exhausted))
    with pytest.raises(FitError, match=r"\(16 x 48 x 64\) does not fit into the memory of device=cpu: lower"):
        run_in(tmp_path, "train.steps=1")
    assert fit.fits == 3
    assert is_out_of_memory(RuntimeError(ALLOCATOR))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert "memory ran out" in str(explain(RuntimeError(ALLOCATOR)))


def test_smaller_chunks_change_a_real_fit_by_rounding_alone(tmp_path: Path) -> None:
    options = ("model.max_experts=6", "bank.m=2", "bank.r=7", "train.steps=3", "dtype=float64")
    whole, _ = run_in(tmp_path / "whole", *options)
    with chunks.halved_chunks(2):
        parted, _ = run_in(tmp_path / "parted", *options)
    assert parted == pytest.approx(whole, rel=1e-6)


def test_a_bank_whose_figures_are_not_finite_fails_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    inner = FakeFit()

    def broken(*args: object, **options: object) -> object:
        result = inner(*args, **options)  # type: ignore[arg-type]
        return replace(result, relfrob=float("nan")) if inner.fits in (2, 3) else result

    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", broken)
    with pytest.raises(FitError, match=r"^layer005\.up failed: its figures are not finite: .*twice"):
        run_in(tmp_path, "layer=4-6", "train.steps=1")
    (folder,) = tmp_path.iterdir()
    found = {key: one["state"] for key, one in load(folder / "status.json")["banks"].items()}
    assert found == {"layer004.up": "finished", "layer005.up": "failed", "layer006.up": "finished"}


def scaled(folder: Path, by: float) -> Path:
    checkpoint = small_checkpoint(folder)
    for expert in range(16):
        change_tensor(
            checkpoint,
            f"model.layers.2.mlp.experts.{expert}.up_proj.weight",
            lambda weight: weight.float() * by,
        )
    return checkpoint


@pytest.mark.parametrize("by", [1e-30, 1e30])
def test_experts_whose_squares_leave_the_range_are_refused_and_not_fitted_to_nothing(
    tmp_path: Path, by: float
) -> None:
    checkpoint = scaled(tmp_path / "model", by)
    options = (
        f"model.path={checkpoint}",
        "layer=2",
        "train.steps=1",
        "bank.m=3",
        "bank.r=7",
        "export_dtype=float32",
    )
    with pytest.raises(FitError, match=r"whose square float32 can't hold: give normalise.scale=family"):
        run_in(tmp_path / "runs", *options, "normalise.scale=none", "normalise.centre=none")
    figure, folder = run_in(tmp_path / "runs", *options)
    assert 0.1 < figure < load(folder / "summary.json")["banks"][0]["relfrob_start"] < 1


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_constant_experts_are_no_fault(tmp_path: Path, value: float) -> None:
    checkpoint = small_checkpoint(tmp_path / "model")
    for expert in range(16):
        name = f"model.layers.2.mlp.experts.{expert}.up_proj.weight"
        change_tensor(checkpoint, name, lambda weight: torch.full_like(weight, value))
    for more in ((), ("bank.atom_rank=3",)):
        figure, _ = run_in(
            tmp_path / "runs",
            f"model.path={checkpoint}",
            "layer=2",
            "train.steps=2",
            "bank.m=3",
            "bank.r=7",
            *more,
        )
        assert figure == 0


@pytest.mark.parametrize(
    "number", [errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOSPC, errno.EMFILE]
)
def test_a_disk_that_fails_is_a_sentence(number: int) -> None:
    for error in (
        OSError(number, os.strerror(number), "banks/state.json"),
        OSError(number, os.strerror(number)),
        OSError(f"banks can't be written: I/O error: {os.strerror(number)} (os error {number})"),
        OSError(f"banks can't be written: {OSError(number, os.strerror(number), 'a file')}"),
    ):
        sentence = explain(error)
        assert sentence is not None, error
        assert "\n" not in sentence


SIGNALS = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU")


@pytest.fixture
def default_signals() -> Iterator[None]:
    """What a shell or nohup has the tests ignore, GloBE would ignore too."""
    before = {name: signal.signal(getattr(signal, name), signal.SIG_DFL) for name in SIGNALS}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.usefixtures("default_signals")
def test_a_signal_is_recorded_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def struck(fit: int, step: int) -> None:
        if fit == 0 and step == 1:
            os.kill(os.getpid(), getattr(signal, name))

    install(monkeypatch, FakeFit(struck))
    with pytest.raises(SystemExit) as ended:
        start(lambda: run_in(tmp_path, "train.steps=2"))
    assert ended.value.code == 128 + getattr(signal, name)
    assert capsys.readouterr().err == f"stopped by {name}: the same command goes on from here\n"
    (folder,) = tmp_path.iterdir()
    assert load(folder / "status.json")["state"] == "interrupted"
    start(lambda: run_in(tmp_path, "train.steps=2"))
    assert load(folder / "status.json")["state"] == "finished"


@pytest.mark.usefixtures("default_signals")
def test_a_command_without_hydra_says_by_what_it_was_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["globe.patch", "run=a", "out=b"])
    with pytest.raises(SystemExit) as ended:
        start(lambda: run_command("", PatchOptions, lambda options: os.kill(os.getpid(), signal.SIGTERM)))
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped by SIGTERM: the same command begins anew\n"


@pytest.mark.parametrize("number", sorted(set(errno.errorcode) - {errno.ENOENT}))
@pytest.mark.parametrize("name", [None, "a\x1b" * 300])
def test_every_error_of_a_disk_is_one_sentence(number: int, name: str | None) -> None:
    error = (
        OSError(number, os.strerror(number)) if name is None else OSError(number, os.strerror(number), name)
    )
    said = explain(error)
    assert said is not None
    assert said.isprintable()
    assert len(said) <= 300


@pytest.mark.usefixtures("default_signals")
def test_a_signal_ends_the_program_as_it_is_typed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "globe.train", "layer=4-9", "train.steps=100000", "train.patience=0"]
    command += ["bank.m=3", "model.max_experts=8", "hydra.run.dir=run", "train.checkpoint_every=0"]
    running = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists() and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=500)
    finally:
        running.kill()
    assert said == "stopped by SIGTERM: the same command goes on from here\n"
    assert running.returncode == 128 + signal.SIGTERM
    assert load(tmp_path / "run" / "status.json")["state"] == "interrupted"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xef\xbb\xbf# @package _global_\nfamily: gate\n", "without a byte-order mark"),
        (b"# @package _global_\ntrain:\n\tsteps: 3\n", "line 3, column 1"),
        (b"\xff\xfefamily", "is not UTF-8 text"),
    ],
)
def test_a_damaged_experiment_of_the_user_is_a_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(content)
    with pytest.raises(Exception) as caught:  # noqa: PT011  of Hydra, of YAML, of Python
        initialize_and_compose(tmp_path)
    assert says in str(explain(caught.value))


def initialize_and_compose(folder: Path) -> None:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        compose("config", overrides=[f"hydra.searchpath=[file://{folder}]", "experiment=mine"])


def test_a_yaml_file_with_a_tab_is_a_sentence() -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        yaml.safe_load("train:\n\tsteps: 3\n")
    sentence = explain(caught.value)
    assert sentence is not None
    assert "line 2, column 1" in sentence
    assert "tabs" in sentence


def test_settings_of_the_environment_that_change_numbers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, FakeFit())
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    caplog.set_level(logging.INFO)
    _, folder = run_in(tmp_path, "train.steps=1")
    assert "part of the numbers: ATEN_CPU_CAPABILITY=avx2" in (folder / "train.log").read_text()
