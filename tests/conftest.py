"""What every test starts from: no network, no key, nothing written to the home folder, shapes checked.

This file runs in every pytest-xdist worker before any test module is imported, so the import hook below sees
the whole package: each function and dataclass of `globe` is wrapped by jaxtyping and beartype.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# OpenMP reads its thread count when torch is first imported; workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
_SCRATCH = Path(tempfile.mkdtemp(prefix="globe-tests-"))
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=str(_SCRATCH / "huggingface"),
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_DIR=str(_SCRATCH / "wandb"),
    WANDB_CONFIG_DIR=str(_SCRATCH / "wandb-config"),
    WANDB_CACHE_DIR=str(_SCRATCH / "wandb-cache"),
    WANDB_DATA_DIR=str(_SCRATCH / "wandb-data"),
    MPLBACKEND="Agg",
    MPLCONFIGDIR=str(_SCRATCH / "matplotlib"),
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("WANDB_API_KEY", None)
for _name in ("WANDB_DIR", "MPLCONFIGDIR"):
    Path(os.environ[_name]).mkdir()

from hypothesis import settings  # noqa: E402  after the environment is set
from jaxtyping import install_import_hook  # noqa: E402

assert "globe" not in sys.modules, "globe was imported before the hook: its shapes would go unchecked"
install_import_hook("globe", "type_checker.check")

# A shell that starts the tests in the background has them ignore interrupts, and so all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine stalls now and then: an example that takes long is no failure. The same examples each time, unless
# new ones are asked for.
settings.register_profile("globe", settings(), deadline=None, derandomize=True)
settings.register_profile(
    "new examples", settings(), deadline=None, derandomize=False, print_blob=True, max_examples=20
)
settings.load_profile("globe")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `make test-portable`."""
    parser.addoption("--new-examples", action="store_true", help="Hypothesis draws new examples")
    parser.addoption(
        "--curvature",
        choices=["bfloat16", "same"],
        help="what curvature_dtype=auto becomes in float32 fits, whatever the hardware",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--new-examples"):
        settings.load_profile("new examples")


@pytest.fixture(autouse=True)
def _curvature(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = request.config.getoption("--curvature")
    if choice is not None:
        monkeypatch.setattr("globe.am.dictionary.low_precision._SMALL", 1)
        monkeypatch.setattr(
            "globe.am.dictionary.low_precision._multiplies_bfloat16", lambda device: choice == "bfloat16"
        )


def pytest_unconfigure() -> None:
    shutil.rmtree(_SCRATCH, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` without an accelerator; torch is imported only if there is such a test."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
