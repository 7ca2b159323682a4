"""Tiny checkpoints, each written once in a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_models import write_tiny


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(model_type, **options of write_tiny)` is a folder to read, never to write."""
    written: dict[tuple[Any, ...], Path] = {}

    def get(model_type: str, **options: Any) -> Path:
        key = (model_type, *sorted(options.items(), key=lambda item: item[0]))
        if key not in written:
            written[key] = write_tiny(model_type, tmp_path_factory.mktemp(model_type), **options)
        return written[key]

    return get
