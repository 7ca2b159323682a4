"""What the tests of patching share: quiet transformers, and one tiny checkpoint an architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from globe.hf.register import install
from tiny_models import write_tiny


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    install()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model type -> folder of its tiny checkpoint in float32, written once; not to be changed."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = write_tiny(model_type, tmp_path_factory.mktemp("tiny") / model_type)
        return made[model_type]

    return folder
