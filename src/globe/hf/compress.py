"""`globe.compress`: a language model in, the same model with factored experts out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from globe.calibration.experts_module import experts_modules
from globe.checkpoint import Checkpoint, open_checkpoint
from globe.checkpoint.in_memory import ExpertsInMemory
from globe.config.choices import FAMILIES_OF, Family
from globe.errors import ConfigError
from globe.hf.loading import load
from globe.hf.patching import dense_view, patch_model
from globe.hf.structure import require_regular
from globe.runs.folder import RunFolder
from globe.sizes.interface import Keywords, config_of, learn_banks


def compress(
    model: Any,
    *,
    kept: float | None = 0.5,
    layers: int | str | Sequence[int] = "all",
    families: Sequence[str] = ("up", "gate"),
    metric: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    S_cache: int | str = "all",
    folder: str | Path | None = None,
    **options: Unpack[Keywords],
) -> Any:
    """Learn banks for the experts of a model and put them in their place.

    Parameters
    ----------
    model        a transformers model in memory, which is changed in place, or a checkpoint folder, a hub id or
                 "embedded", which is loaded
    kept         share of the experts' own numbers to keep at most, 0 to 1. None takes the sizes that `overrides`
                 gives, such as ["bank.m=n/4", "bank.r=p/2"]
    layers       a number, a list of them, or words as the option `layer` takes them: "all", "4-8", "middle"
    families     the matrices: one of "up", "gate" and "down", up and gate, or all three; each gets a bank per layer
    metric, steps
                 as the options `normalise.metric` and `train.steps` of `python -m globe.train`
    S_cache      experts per layer and family whose bases stay composed: 0 composes at each call, "all" keeps every one
    folder       where the banks are kept: a run folder that `globe.patch` and `globe.evaluate` take, and from which
                 an interrupted call goes on when it is repeated. None keeps none
    options      see `globe.sizes.interface.Keywords`

    Returns
    -------
    The model, in evaluation mode if it was loaded here. `save_pretrained` writes a compact checkpoint.

    Raises
    ------
    ConfigError, CheckpointError and FitError as `globe.fit`; CheckpointError also where the experts of the
    architecture can't run factored. The model is then unchanged.

    >>> import globe
    >>> model = globe.compress("embedded", kept=0.6, layers=[3, 12], steps=5)
    >>> globe.load("embedded").num_parameters() > model.num_parameters()
    True
    """
    given = {"kept": kept, "layer": _layers(layers), "family": _family(families)}
    config = config_of(
        given | {"metric": metric, "steps": steps, "seed": seed}, options, {"S_cache": S_cache}
    )
    if isinstance(model, str | Path):
        checkpoint: Checkpoint = open_checkpoint(str(model))
        loaded = load(model)
    else:
        checkpoint, loaded = _in_memory(model), model
    with tempfile.TemporaryDirectory(prefix="globe-") if folder is None else nullcontext(folder) as where:
        learn_banks(config, checkpoint, RunFolder(where), progress=options.get("progress", False))
        return patch_model(loaded, where, S_cache=S_cache)


def _layers(layers: int | str | Sequence[int]) -> int | str | list[int]:
    return layers if isinstance(layers, int | str) else [int(layer) for layer in layers]


def _family(families: Sequence[str]) -> str:
    """Return the word of the option `family` for these families."""
    wanted = {families} if isinstance(families, str) else set(families)
    for word in Family:
        if wanted in ({word}, set(FAMILIES_OF.get(word, (word,)))):
            return str(word)
    listed = "; ".join(", ".join(FAMILIES_OF.get(word, (word,))) for word in Family)
    raise ConfigError(f"families={families!r} is not possible: give one of {listed}")


def _in_memory(model: Any) -> ExpertsInMemory:
    """Return the routed experts of a transformers model, as views of its weights."""
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        raise ConfigError(
            f"model={type(model).__name__} is not possible: give a transformers model, a checkpoint folder, a hub id "
            "or embedded"
        )
    names = experts_modules(model)
    experts: dict[tuple[int, str], Tensor] = {}
    for layer, name in names.items():
        module = model.get_submodule(name)
        require_regular(module, name)
        experts |= {(layer, family): dense_view(module, family) for family in FAMILIES_OF[Family.all]}
    if not experts:
        raise ConfigError(f"{type(model).__name__} has no routed experts: give a Mixture-of-Experts model")
    return ExpertsInMemory(
        experts,
        model_type=str(config.model_type),
        parameters=sum(one.numel() for one in model.parameters()),
    )
