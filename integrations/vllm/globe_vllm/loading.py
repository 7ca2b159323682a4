"""Factors on their way from the files to their layers, past the names that each model class of vLLM knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

PLACES: dict[int, Any] = {}
"""Layer number -> the factors of its families; filled while vLLM builds the model."""
SHARED: dict[str, Any] = {}
"""Name of a bank at the root of the model -> the bank."""
ROOT = "globe_banks."


def divert_factors() -> None:
    """Have vLLM's loader hand GloBE's tensors to their layers, and everything else to the model class as ever.

    A model class maps names by rules of its own and drops, without a word, expert tensors that it does not know. With
    factors on board it also has to account for every parameter it has, so that no weight stays as it was drawn.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    if getattr(DefaultModelLoader, "globe_factors", False):
        return
    upstream = DefaultModelLoader.get_all_weights

    def get_all_weights(self: Any, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        if model_config.quantization == "globe":
            self.enable_weights_track = True
        for name, value in upstream(self, model_config, model):
            if not take(name, value):
                yield name, value

    DefaultModelLoader.get_all_weights = get_all_weights
    DefaultModelLoader.globe_factors = True


def take(name: str, value: Tensor) -> bool:
    """Put a tensor into its factors if it is one of GloBE's. Raises ValueError if it has no place there."""
    if name.startswith(ROOT):
        bank, _, factor = name.removeprefix(ROOT).partition(".")
        if bank not in SHARED:
            raise ValueError(
                f"globe: the checkpoint holds {name}, which its config.json does not name: patch again"
            )
        SHARED[bank].load(factor, value)
        return True
    before, found, after = name.partition(".globe_")
    if not found:
        return False
    family, _, factor = after.partition(".")
    numbers = [int(part) for part in before.split(".") if part.isdigit()]
    if len(numbers) != 1 or family not in PLACES.get(numbers[0], {}):
        raise ValueError(
            f"globe: the checkpoint holds {name}, which its config.json does not name: patch again"
        )
    PLACES[numbers[0]][family].load(factor, value)
    return True
