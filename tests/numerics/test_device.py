"""Device, threads, determinism and seeds of a run."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

import pytest
import torch

from globe.config.choices import Device, FitDtype
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.numerics.device import (
    arithmetic,
    bank_seed,
    peak_device_bytes,
    peak_host_bytes,
    pick_device,
    return_large_blocks,
)


def test_auto_takes_cuda_where_it_is_and_never_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(Device.auto) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(Device.auto) == torch.device("cuda")
    assert pick_device(Device.cuda) == torch.device("cuda")
    assert pick_device(Device.cpu) == torch.device("cpu")
    assert pick_device(Device.mps) == torch.device("mps")


def test_a_device_that_is_not_there_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in (Device.cuda, Device.mps):
        with pytest.raises(ConfigError, match=rf"device={device} is not available.*device=cpu or auto"):
            pick_device(device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="dtype=float64 is not possible on device=mps"):
        pick_device(Device.mps, FitDtype.float64)


def test_what_is_global_is_put_back_even_after_a_failure() -> None:
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    config = Config(device=Device.cpu, threads=before[0] + 1, deterministic=True)

    def fail() -> None:
        with arithmetic(config) as device:
            assert device == torch.device("cpu")
            assert torch.get_num_threads() == before[0] + 1
            assert torch.are_deterministic_algorithms_enabled()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_seeds_differ_by_bank_run_and_attempt_and_stay_what_they_are() -> None:
    keys = [(0, "layer001.up", 0), (0, "layer001.gate", 0), (1, "layer001.up", 0), (0, "layer001.up", 1)]
    seeds = [bank_seed(seed, key, attempt) for seed, key, attempt in keys]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == bank_seed(0, "layer001.up") == 4110944351267411961
    torch.Generator().manual_seed(max(seeds))


def test_peak_memory_is_in_bytes() -> None:
    peak = peak_host_bytes()
    assert peak is None or 10 * 2**20 < peak < 2**40
    assert peak_device_bytes(torch.device("cpu")) is None


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_large_blocks_go_back_when_they_are_freed() -> None:
    """A block that was freed once does not make glibc keep the next ones of its size."""
    return_large_blocks()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    block = torch.ones(7_000_000)
    del block
    before = resident()
    blocks = [torch.ones(6_000_000) for _ in range(3)]
    assert resident() - before > 60e6
    del blocks[0]  # the later ones lie above it, were it in the heap
    assert resident() - before < 60e6
