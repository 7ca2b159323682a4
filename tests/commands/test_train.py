"""Whole runs: what they leave behind, and that stopping, failing or repeating one changes no number."""

from __future__ import annotations

import errno
import gc
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import globe.fit.one_bank
import globe.fit.watch
from globe.am.loop import fit_bank
from globe.am.records import FitResult, StepRecord
from globe.bank.compose import rebuild
from globe.bank.file import read_artefact
from globe.checkpoint import open_checkpoint
from globe.config import commands as entry
from globe.config.composition import config_dict, to_config
from globe.errors import ArtefactError, CheckpointError, ConfigError, FitError
from globe.runs.folder import RunFolder
from globe.train import run
from run_support import (
    EMBEDDED,
    FakeFit,
    bytes_of,
    change_tensor,
    composed,
    lines,
    load,
    run_in,
    small_checkpoint,
)
from tiny_models import write_tiny

FEW = ("train.steps=3", "model.max_experts=8", "bank.m=3", "bank.r=11")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeFit:
    return install(monkeypatch, FakeFit())


def install(monkeypatch: pytest.MonkeyPatch, fit: FakeFit) -> FakeFit:
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", fit)
    return fit


# --- what a run leaves behind ---------------------------------------------------------------------------------------


def test_a_real_run_leaves_a_whole_folder_and_a_true_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, folder = run_in(tmp_path, "layer=12", "export_dtype=float32", "codes.every=2", *FEW)
    summary, status = load(folder / "summary.json"), load(folder / "status.json")
    assert status["state"] == "finished"
    assert status["banks"]["layer012.up"]["state"] == "finished"
    assert summary["relfrob"] == figure
    assert to_config(composed()) is not None
    (bank,) = summary["banks"]
    p, d = EMBEDDED.p, EMBEDDED.d
    assert (bank["n"], bank["p"], bank["d"], bank["m"], bank["r"]) == (8, p, d, 3, 11)
    kept = 8 * p * 11 + 3 * 11 * d + 8 * 3 + 1  # and the stored mean
    assert bank["kept"] == pytest.approx(kept / (8 * p * d))
    assert bank["kept_model"] == pytest.approx(1 - (8 * p * d - kept) / summary["total_parameters"])
    assert [line["step"] for line in lines(folder)] == [1, 2, 3]
    assert all(not isinstance(value, dict | list) for line in lines(folder) for value in line.values())
    # the figure, from nothing but the checkpoint and the artefact
    W = open_checkpoint(None).read_experts(12, "up", max_experts=8).weights.double()
    approximation = rebuild(read_artefact(folder / "banks" / "layer012.up")).double()
    assert figure == pytest.approx(float((W - approximation).norm() / (W - W.mean()).norm()), rel=1e-5)
    assert not list((folder / "banks").glob("*.partial"))
    printed = capsys.readouterr().out
    assert "layer012.up" in printed
    assert "8 x 48 x 64" in printed
    assert f"{figure:.4f}" in printed


def test_the_written_configuration_is_the_one_that_ran(tmp_path: Path, fake: FakeFit) -> None:
    from omegaconf import OmegaConf

    _, folder = run_in(tmp_path, "layer=[3,5]", "bank.m=n/8", "train.steps=2", "seed=7")
    written = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert written == config_dict(to_config(composed("layer=[3,5]", "bank.m=n/8", "train.steps=2", "seed=7")))


def test_families_and_layers_get_a_bank_each_and_the_figure_is_their_mean(
    tmp_path: Path, fake: FakeFit
) -> None:
    figure, folder = run_in(tmp_path, "family=both", "layer=4-5", "train.steps=2")
    keys = ["layer004.up", "layer004.gate", "layer005.up", "layer005.gate"]
    summary = load(folder / "summary.json")
    assert [bank["key"] for bank in summary["banks"]] == keys
    assert figure == pytest.approx(sum(bank["relfrob"] for bank in summary["banks"]) / 4)
    assert 0 <= summary["metrics"]["support_jaccard"] <= 1
    artefact = read_artefact(folder / "banks" / "layer005.gate")
    assert (artefact.members[0].layer, artefact.members[0].family) == (5, "gate")
    up = open_checkpoint(None).read_experts(5, "up").weights.float()
    gate = open_checkpoint(None).read_experts(5, "gate").weights.float()
    rebuilt = rebuild(artefact).float()
    assert (rebuilt - gate).norm() < (rebuilt - up).norm()


def test_sampling_of_experts_reaches_the_artefact(tmp_path: Path, fake: FakeFit) -> None:
    sampling = ("model.max_experts=4", "model.sample_method=evenly_spaced")
    _, folder = run_in(tmp_path, *sampling, "bank.m=2", "train.steps=1")
    assert read_artefact(folder / "banks" / "layer012.up").members[0].experts == (0, 5, 10, 15)


def test_every_figure_is_plain_and_finite_or_null(tmp_path: Path, fake: FakeFit) -> None:
    _, folder = run_in(tmp_path, "train.steps=1", "bank.m=n", "bank.r=p")
    figures = load(folder / "summary.json")["banks"][0]["metrics"]
    for name in (
        "mse",
        "explained_variance",
        "global_mean",
        "energy_captured",
        "effective_rank_mean",
        "support_mean",
        "code_entropy",
        "effective_support",
        "zero_share",
        "pruned_share",
        "atom_usage_max",
        "atom_norm_mean",
        "coherence_max",
        "code_condition",
        "temperature",
        "accepted",
    ):
        assert figures[name] is None or isinstance(figures[name], float)


def test_one_bank_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    inner = FakeFit()

    def watching(experts: torch.Tensor, *args: object, **kwargs: object) -> object:
        gc.collect()
        assert not [one for one in alive if one() is not None], "experts of an earlier bank are still held"
        alive.append(weakref.ref(experts))
        return inner(experts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", watching)
    run_in(tmp_path, "layer=2-4", "train.steps=1")
    assert len(alive) == 3


def test_a_model_that_stays_dense_is_told_so_before_the_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny("gpt_oss", tmp_path / "model")
    run_in(tmp_path, f"model.path={model}", "layer=0", "bank.m=2", "bank.r=3", "train.steps=1")
    messages = [record.getMessage() for record in caplog.records]
    said = next(
        at
        for at, one in enumerate(messages)
        if "gpt_oss can't run with factors (its experts have biases)" in one
    )
    assert "format=dense, whose files are as large as before" in messages[said]
    assert not [one for one in messages[:said] if "step" in one]
    (following,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    assert following.endswith("out=FOLDER")  # and not "with format=globe"
    capsys.readouterr()
    run_in(tmp_path, f"model.path={model}", "layer=0", "bank.m=2", "bank.r=3", "dry_run=true")
    shown = capsys.readouterr().out
    assert "stay with format=dense" in shown
    assert "serving" not in shown  # what factors would cost


def test_a_bank_larger_than_its_experts_is_warned_about(
    tmp_path: Path, fake: FakeFit, caplog: pytest.LogCaptureFixture
) -> None:
    run_in(tmp_path, "bank.m=n", "bank.r=p", "train.steps=1")
    assert "layer012.up: 176 % of the parameters kept is no compression" in caplog.text


@pytest.mark.gpu
def test_a_run_on_cuda_ends_where_a_run_on_the_cpu_does(tmp_path: Path) -> None:
    on_cpu, _ = run_in(tmp_path / "cpu", "device=cpu", "export_dtype=float32", *FEW)
    on_cuda, folder = run_in(tmp_path / "cuda", "device=cuda", "export_dtype=float32", *FEW)
    assert on_cuda == pytest.approx(on_cpu, rel=1e-2)
    assert load(folder / "summary.json")["banks"][0]["runtime"]["peak_device_bytes"] > 0


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_the_order_and_number_of_banks_change_nothing(tmp_path: Path) -> None:
    _, many = run_in(tmp_path, "layer=[4,9]", "family=both", *FEW)
    _, one = run_in(tmp_path, "layer=9", "family=gate", *FEW)
    assert bytes_of(many, "layer009.gate") == bytes_of(one, "layer009.gate")
    assert bytes_of(many, "layer004.gate") != bytes_of(one, "layer009.gate")


def test_another_seed_gives_another_bank(tmp_path: Path, fake: FakeFit) -> None:
    _, first = run_in(tmp_path, "seed=0", "train.steps=1")
    _, second = run_in(tmp_path, "seed=1", "train.steps=1")
    assert bytes_of(first, "layer012.up") != bytes_of(second, "layer012.up")


# --- repeating and resuming -----------------------------------------------------------------------------------------


def test_a_finished_run_is_reported_and_not_repeated(
    tmp_path: Path, fake: FakeFit, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, folder = run_in(tmp_path, "train.steps=2")
    before = load(folder / "status.json")
    capsys.readouterr()
    again, _ = run_in(tmp_path, "train.steps=2")
    assert (again, fake.fits) == (figure, 1)
    assert "layer012.up" in capsys.readouterr().out
    assert load(folder / "status.json") == before
    repeated, _ = run_in(tmp_path, "train.steps=2", "overwrite=true")
    assert (repeated, fake.fits) == (figure, 2)
    assert [line["step"] for line in lines(folder)] == [1, 2]


def test_a_wrong_option_that_is_no_part_of_the_name_leaves_a_finished_run_finished(
    tmp_path: Path, fake: FakeFit
) -> None:
    _, folder = run_in(tmp_path, "train.steps=2")
    with pytest.raises(ConfigError, match="threads"):
        run_in(tmp_path, "train.steps=2", "threads=0")
    assert load(folder / "status.json")["state"] == "finished"


def test_a_finished_run_whose_artefact_is_gone_is_done_again(tmp_path: Path, fake: FakeFit) -> None:
    _, folder = run_in(tmp_path, "train.steps=2")
    (folder / "banks" / "layer012.up" / "globe.json").unlink()
    run_in(tmp_path, "train.steps=2")
    assert fake.fits == 2


@pytest.mark.parametrize("damaged", ["bank.safetensors", "globe.json"])
def test_a_finished_run_whose_artefact_was_damaged_since_learns_it_anew(
    tmp_path: Path, fake: FakeFit, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    _, folder = run_in(tmp_path, "layer=4-5", "train.steps=2")
    file = folder / "banks" / "layer005.up" / damaged
    whole = file.read_bytes()
    # the tensors are hashed in the record; the record's own figures are not
    file.write_bytes(
        whole[: len(whole) // 2] if damaged == "globe.json" else whole[:-1] + bytes([whole[-1] ^ 1])
    )
    run_in(tmp_path, "layer=4-5", "train.steps=2")
    assert fake.fits == 3
    assert "layer005.up: the artefact there can't be used and is learned anew" in caplog.text
    assert file.read_bytes() == whole
    assert [line["step"] for line in lines(folder)] == [1, 2, 1, 2]


def test_ctrl_c_keeps_what_is_finished_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(fit: int, step: int) -> None:
        if (fit, step) == (1, 2):
            raise KeyboardInterrupt

    options = ("layer=4-6", "train.steps=5", "train.checkpoint_every=0")
    install(monkeypatch, FakeFit(stop))
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "a", *options)
    (folder,) = (tmp_path / "a").iterdir()
    status = load(folder / "status.json")
    assert status["state"] == "interrupted"
    assert {key: bank["state"] for key, bank in status["banks"].items()} == {
        "layer004.up": "finished",
        "layer005.up": "interrupted",
    }
    assert len(load(folder / "summary.json")["banks"]) == 1
    second = install(monkeypatch, FakeFit())
    figure, _ = run_in(tmp_path / "a", *options)
    assert second.resumed_at == [2, None]
    undisturbed, other = run_in(tmp_path / "b", *options)
    assert figure == undisturbed
    for key in ("layer004.up", "layer005.up", "layer006.up"):
        assert bytes_of(folder, key) == bytes_of(other, key)
    steps = [(line["bank"], line["step"]) for line in lines(folder)]
    assert steps == [
        (key, step) for key in ("layer004.up", "layer005.up", "layer006.up") for step in range(1, 6)
    ]


def cut_off(step: int) -> Callable[..., FitResult]:
    """`fit_bank`, stopped by Ctrl-C in the step after `step`, whose checkpoint is then the last."""

    def fit(*args: Any, on_step: Callable[[StepRecord], None], **kwargs: Any) -> FitResult:
        def stopping(record: StepRecord) -> None:
            on_step(record)
            if record.step == step + 1:
                raise KeyboardInterrupt

        return fit_bank(*args, on_step=stopping, **kwargs)

    return fit


@pytest.mark.parametrize("options", [(), ("codes.target_support=2", "schedule=homotopy")])
def test_a_resumed_fit_equals_an_undisturbed_one_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    options = (
        *options,
        *("train.steps=12", "codes.every=2", "train.evaluate_every=2", "train.checkpoint_every=0"),
        *("model.max_experts=8", "bank.m=3", "bank.r=11"),
    )
    _, whole = run_in(tmp_path / "whole", *options)
    for stop_after in (1, 5, 10):
        monkeypatch.setattr(globe.fit.one_bank, "fit_bank", cut_off(stop_after))
        root = tmp_path / str(stop_after)
        with pytest.raises(KeyboardInterrupt):
            run_in(root, *options)
        monkeypatch.setattr(globe.fit.one_bank, "fit_bank", fit_bank)
        _, resumed = run_in(root, *options)
        assert bytes_of(resumed, "layer012.up") == bytes_of(whole, "layer012.up")
        record = "banks/layer012.up/globe.json"
        assert (resumed / record).read_bytes() == (whole / record).read_bytes()
        untimed = [{k: v for k, v in line.items() if "seconds" not in k} for line in lines(resumed)]
        assert untimed == [{k: v for k, v in line.items() if "seconds" not in k} for line in lines(whole)]


@pytest.mark.parametrize("damage", ["cut", "flip", "no record", "bad record", "foreign"])
def test_a_damaged_checkpoint_is_ignored_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    def stop(fit: int, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    options = ("train.steps=4", "train.checkpoint_every=0")
    install(monkeypatch, FakeFit(stop))
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, *options)
    (folder,) = tmp_path.iterdir()
    partial = folder / "banks" / "layer012.up.partial"
    (tensors,) = partial.glob("*.safetensors")
    record = partial / "state.json"
    match damage:
        case "cut":
            tensors.write_bytes(tensors.read_bytes()[:-9])
        case "flip":
            content = bytearray(tensors.read_bytes())
            content[-5] ^= 1
            tensors.write_bytes(content)
        case "no record":
            record.unlink()
        case "bad record":
            record.write_text('{"fingerprint": ')
        case "foreign":
            record.write_text(record.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    fit = install(monkeypatch, FakeFit())
    with caplog.at_level(logging.WARNING):
        run_in(tmp_path, *options)
    assert fit.resumed_at == [None]
    assert "is ignored" in caplog.text
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]
    assert not partial.exists()


def test_a_damaged_artefact_is_learned_anew_and_a_whole_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(fit: int, step: int) -> None:
        if fit == 2:
            raise KeyboardInterrupt

    install(monkeypatch, FakeFit(stop))
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, "layer=4-6", "train.steps=1")
    (folder,) = tmp_path.iterdir()
    file = folder / "banks" / "layer005.up" / "bank.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    fit = install(monkeypatch, FakeFit())
    run_in(tmp_path, "layer=4-6", "train.steps=1")
    assert fit.fits == 2  # layers 5 and 6
    assert "layer005.up: the artefact there can't be used" in caplog.text
    assert file.read_bytes() == whole


def test_a_changed_checkpoint_is_noticed_and_an_unchanged_copy_is_not_learned_again(
    tmp_path: Path, fake: FakeFit
) -> None:
    checkpoint = small_checkpoint(tmp_path / "model")
    options = (f"model.path={checkpoint}", "layer=2-3", "train.steps=1")
    _, folder = run_in(tmp_path / "runs", *options)
    assert fake.fits == 2
    os.utime(next(checkpoint.glob("*.safetensors")))  # touched: the hash says nothing changed
    run_in(tmp_path / "runs", *options)
    assert fake.fits == 2
    before = bytes_of(folder, "layer003.up")
    change_tensor(checkpoint, "model.layers.2.mlp.experts.5.up_proj.weight", lambda weight: weight * 1.5)
    run_in(tmp_path / "runs", *options)
    assert fake.fits == 3
    assert bytes_of(folder, "layer003.up") == before


# --- failing --------------------------------------------------------------------------------------------------------


def test_a_broken_fit_is_tried_once_more_with_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_first(fit: int, step: int) -> None:
        if fit == 0 and step == 1:
            raise FitError("the numbers are no longer finite: lower something")

    fit = install(monkeypatch, FakeFit(break_first))
    _, folder = run_in(tmp_path, "train.steps=2", "train.checkpoint_every=0")
    assert fit.resumed_at == [None, None]  # the second try starts anew
    status = load(folder / "status.json")["banks"]["layer012.up"]
    assert (status["state"], status["attempt"]) == ("finished", 1)
    assert "no longer finite" in status["error"]
    bank = load(folder / "summary.json")["banks"][0]
    assert (bank["attempt"], bank["seed"]) == (1, status["seed"])
    assert [line["step"] for line in lines(folder)] == [1, 2]


def test_a_bank_that_fails_twice_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_second_bank(fit: int, step: int) -> None:
        if fit in (1, 2):
            raise torch.linalg.LinAlgError("not positive definite")

    fit = install(monkeypatch, FakeFit(break_second_bank))
    with pytest.raises(
        FitError, match=r"^layer005\.up failed: not positive definite \(twice, with two seeds\)$"
    ):
        run_in(tmp_path, "layer=4-6", "train.steps=1")
    (folder,) = tmp_path.iterdir()
    status = load(folder / "status.json")
    assert status["state"] == "failed"
    assert "layer005.up" in status["error"]
    assert {key: bank["state"] for key, bank in status["banks"].items()} == {
        "layer004.up": "finished",
        "layer005.up": "failed",
        "layer006.up": "finished",
    }
    assert list(load(folder / "summary.json")["failed"]) == ["layer005.up"]
    assert "failed" in capsys.readouterr().out
    assert fit.fits == 4
    install(monkeypatch, FakeFit())
    run_in(tmp_path, "layer=4-6", "train.steps=1")  # the same command tries it again, and only it
    assert load(folder / "status.json")["state"] == "finished"
    assert load(folder / "summary.json")["failed"] == {}


def test_a_layer_that_cannot_be_read_is_reported_and_not_retried(tmp_path: Path, fake: FakeFit) -> None:
    checkpoint = small_checkpoint(tmp_path / "model")
    change_tensor(
        checkpoint, "model.layers.2.mlp.experts.5.up_proj.weight", lambda weight: weight * float("nan")
    )
    options = (f"model.path={checkpoint}", "layer=1-3", "train.steps=1")
    with pytest.raises(FitError, match=r"layer002\.up failed: .*experts\.5\.up_proj"):
        run_in(tmp_path / "runs", *options)
    assert fake.fits == 2


def test_a_full_disk_stops_the_run_with_a_sentence_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeFit
) -> None:
    whole = globe.fit.one_bank.write_artefact

    def full(artefact: object, folder: Path) -> None:
        if folder.name == "layer005.up":
            cause = OSError(errno.ENOSPC, "No space left on device")
            raise ArtefactError(f"{folder} can't be written: free space or give another folder") from cause
        whole(artefact, folder)  # type: ignore[arg-type]

    monkeypatch.setattr(globe.fit.one_bank, "write_artefact", full)
    with pytest.raises(ArtefactError) as caught:
        run_in(tmp_path, "layer=4-6", "train.steps=1")
    assert entry.is_disk_full(caught.value)
    assert fake.fits == 2  # layer 6 is not begun: it could not be written either
    (folder,) = tmp_path.iterdir()
    assert load(folder / "status.json")["state"] == "failed"
    read_artefact(folder / "banks" / "layer004.up")
    monkeypatch.setattr(globe.fit.one_bank, "write_artefact", whole)
    run_in(tmp_path, "layer=4-6", "train.steps=1")
    assert fake.fits == 4


def test_a_disk_that_is_full_at_a_checkpoint_is_one_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeFit
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "state.json")

    monkeypatch.setattr(globe.fit.watch, "write_state", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run_in(tmp_path, "train.checkpoint_every=0", "train.steps=2")
    sentence = entry.explain(caught.value)
    assert sentence is not None
    assert sentence.startswith("the disk is full, writing state.json failed")


def test_memory_that_runs_out_names_the_bank_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(fit: int, step: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    fit = install(monkeypatch, FakeFit(exhausted))
    with pytest.raises(
        FitError, match=r"layer012\.up \(16 x 48 x 64\) does not fit into the memory of device=cpu"
    ):
        run_in(tmp_path, "train.steps=1")
    assert 1 < fit.fits < 8  # with smaller chunks each time, as long as they can be halved


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(fit: int, step: int) -> None:
        raise ZeroDivisionError("ours")

    install(monkeypatch, FakeFit(mistake))
    with pytest.raises(ZeroDivisionError) as caught:
        run_in(tmp_path, "train.steps=1")
    assert entry.explain(caught.value) is None
    (folder,) = tmp_path.iterdir()
    status = load(folder / "status.json")
    assert (status["state"], status["error"]) == ("failed", "ZeroDivisionError: ours")


@pytest.mark.parametrize(
    "wrong", ["model.path=./nowhere", "layer=99", "bank.m=n/5", "threads=0", "device=cuda"]
)
def test_a_command_that_fails_before_its_first_bank_leaves_nothing(tmp_path: Path, wrong: str) -> None:
    if wrong == "device=cuda" and torch.cuda.is_available():
        return
    with pytest.raises((CheckpointError, ConfigError)):
        run_in(tmp_path, wrong)
    assert not list(tmp_path.iterdir())


def test_a_run_of_a_sweep_records_why_it_failed_before_its_first_bank(tmp_path: Path) -> None:
    node = composed("layer=99")
    with pytest.raises(ConfigError):
        run(node, tmp_path / "one", sweep_name="s")
    status = load(tmp_path / "one" / "status.json")
    assert (status["state"], status["error"]) == (
        "failed",
        "layer=99 is not in this model of 24 layers: give layers out of 0-23",
    )


def test_two_processes_do_not_share_a_run(tmp_path: Path, fake: FakeFit) -> None:
    node = composed("train.steps=1")
    with RunFolder(tmp_path / "one").held(), pytest.raises(ConfigError, match="in use by another process"):
        run(node, tmp_path / "one")
    assert run(node, tmp_path / "one") > 0
