"""Where and how a run calculates: device, dtype, threads, determinism, peak memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from globe.config.choices import Device, FitDtype
from globe.config.schema import Config
from globe.errors import ConfigError


def pick_device(device: Device, dtype: FitDtype = FitDtype.float32) -> torch.device:
    """Return the device asked for; `auto` is CUDA where there is one and otherwise the CPU.

    `auto` never picks MPS: it has no float64, which the solves fall back on. Raises ConfigError with the
    remedy when the device is not there or can't do the dtype.
    """
    match device:
        case Device.auto:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        case Device.cuda if not torch.cuda.is_available():
            raise ConfigError(
                "device=cuda is not available (no device, or a torch without it): give device=cpu or auto"
            )
        case Device.mps if not torch.backends.mps.is_available():
            raise ConfigError("device=mps is not available on this machine: give device=cpu or auto")
        case Device.mps if dtype is FitDtype.float64:
            raise ConfigError("dtype=float64 is not possible on device=mps: give dtype=float32 or device=cpu")
    return torch.device(str(device))


@contextmanager
def arithmetic(config: Config) -> Iterator[torch.device]:
    """Yield the device of a run, with its threads and determinism set; both are put back at the end.

    They are global to the process, and the runs of a sweep share one.
    """
    device = pick_device(config.device, config.dtype)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield device
    finally:
        torch.set_num_threads(threads)
        if config.deterministic:  # the call itself imports 70 MB of torch
            torch.use_deterministic_algorithms(deterministic)


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Options of `mallopt`, from malloc.h."""
_LARGE_BLOCK = 1 << 22

SMALL_BANK = 1_000_000
"""Numbers in a bank's experts below which one thread is used: handing such small products to a second thread gains
nothing on idle cores, and on busy ones the threads wait for each other (a fit of the embedded model: 4 s, or 75 s)."""


def limit_threads(config: Config, largest: int) -> None:
    """Use one thread for a run whose largest bank has `largest` numbers, if that is small and `threads` is not given.

    Inside `arithmetic`, which puts the number of threads back.
    """
    if config.threads is None and largest < SMALL_BANK:
        torch.set_num_threads(1)


def bank_seed(seed: int, key: str, attempt: int = 0) -> int:
    """Return the seed of one bank's generator, below 2**63.

    Depends on nothing but the run's seed, the bank's key and the attempt, so that neither the order of the
    banks nor skipping some changes a number.
    """
    digest = hashlib.sha256(f"{seed}/{key}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def return_large_blocks() -> None:
    """Make the allocator (glibc) return large blocks when they are freed, which lowers the peak of a large fit.

    For the life of the process. glibc would take the largest block that was ever freed, up to 32 MB, as one to keep;
    here a block of 4 MB, such as a chunk's temporaries of a large fit, gets pages of its own, and no more than that
    stays free at the end of the heap. With 16 MB the peak was 0.26 of the experts' memory higher.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
                mallopt(option, _LARGE_BLOCK)


def trim_heap() -> None:
    """Return freed host memory to the system, where the allocator (glibc) would keep it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_host_bytes() -> int | None:
    """Return the largest resident memory of the process so far; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """Return the largest memory allocated on a CUDA device since the run began; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
