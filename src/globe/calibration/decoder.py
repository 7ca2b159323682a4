"""A model of which one decoder layer at a time is in memory, read from the checkpoint when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from globe.calibration.experts_module import ExpertsView, experts_modules
from globe.checkpoint import Checkpoint
from globe.checkpoint.model_config import understood
from globe.checkpoint.quantised.reader import forget_quantisation
from globe.checkpoint.shards import StoredTensor
from globe.errors import CheckpointError
from globe.numerics.device import trim_heap


class Decoder:
    """The text part of a model: embeddings (with `head` the output layer too) in memory, every layer on its own.

    transformers builds the modules without values and says which stored tensor goes where, so every architecture that
    it can load works here. Raises CheckpointError for a model whose layers can't be told apart.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, head: bool = False
    ) -> None:
        self._head = head
        self._checkpoint, self._dtype, self.device = checkpoint, dtype, device
        with understood(checkpoint.folder):
            self._model = _without_values(checkpoint, dtype)
        self._experts = experts_modules(self._model)
        prefixes = {name.split(f".{layer}.")[0] for layer, name in self._experts.items()}
        if len(prefixes) != 1:
            raise CheckpointError(
                f"the layers of {type(self._model).__name__} can't be told apart: leave calibrate.text=null"
            )
        self._layers = prefixes.pop()
        self._root = self._layers.rpartition(".")[0]
        modules = self._model.get_submodule(self._layers)
        assert isinstance(modules, nn.ModuleList)
        self._modules: list[nn.Module] = list(modules)
        with understood(checkpoint.folder):
            self._names = self._stored_names()
        self.wrapped: int | None = None
        """Fields of the tuple that a decoder layer gives; None where it gives the hidden states alone."""
        with understood(checkpoint.folder):
            self._load_rest()

    @property
    def layers(self) -> int:
        """Decoder layers, with experts or without."""
        return len(self._modules)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(sorted(self._experts))

    def experts(self, layer: int) -> tuple[nn.Module, ExpertsView]:
        """Return the experts module of a layer that is in memory."""
        name = self._experts[layer]
        module = self._model.get_submodule(name)
        return module, ExpertsView(module, name)

    @contextmanager
    def loaded(self, layer: int) -> Iterator[None]:
        """Hold the values of a decoder layer in memory."""
        module = self._modules[layer]
        self._load(self._names.get(layer, []))
        module.requires_grad_(False)
        absent = [name for name, one in module.named_parameters() if one.is_meta]
        if absent:
            raise CheckpointError(
                f"{self._checkpoint.folder} lacks {self._layers}.{layer}.{absent[0]}: download it again"
            )
        try:
            yield
        finally:
            for part in module.modules():
                for name, one in list(part.named_parameters(recurse=False)):
                    part.register_parameter(name, nn.Parameter(torch.empty_like(one, device="meta"), False))

    def step(
        self, layer: int, ids: Int[Tensor, "b t"], hidden: Float[Tensor, "b t ..."] | None
    ) -> Float[Tensor, "b t ..."]:
        """Return what a loaded decoder layer makes of the hidden states before it; None takes the embeddings.

        The model's own loop over its layers runs, so that masks and positions are what they always are; the other
        layers hand on what they are given.
        """
        found: list[Any] = []

        def at_layer(given: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(type(module).forward(module, given if hidden is None else hidden, *args, **kwargs))
            return found[0]

        def before(given: Tensor, *args: Any, **kwargs: Any) -> Any:
            return given if self.wrapped is None else (given, *[None] * (self.wrapped - 1))

        module = self._modules[layer]
        replaced = {layer: at_layer} | dict.fromkeys(range(layer), before)
        replaced |= dict.fromkeys(range(layer + 1, self.layers), lambda *args, **kwargs: found[0])
        with self._forwards(replaced), understood(self._checkpoint.folder, "run"):
            self._model.get_submodule(self._root)(input_ids=ids.to(self.device), use_cache=False)
        output = found[0]
        self.wrapped = len(output) if isinstance(output, tuple) else None
        return output[0] if isinstance(output, tuple) else output

    def logits(self, ids: Int[Tensor, "b t"], hidden: Float[Tensor, "b t ..."]) -> Float[Tensor, "b t v"]:
        """Return what norm and output layer make of the hidden states after the last layer; needs `head`."""
        assert self._head

        def last(*args: Any, **kwargs: Any) -> Any:
            return hidden if self.wrapped is None else (hidden, *[None] * (self.wrapped - 1))

        with self._forwards(dict.fromkeys(range(self.layers), last)):
            return self._model(input_ids=ids.to(self.device), use_cache=False).logits

    @contextmanager
    def _forwards(self, replaced: dict[int, Callable[..., Any]]) -> Iterator[None]:
        """Let decoder layers do something else when the model calls them."""
        for layer, forward in replaced.items():
            self._modules[layer].forward = forward
        try:
            yield
        finally:
            for layer in replaced:
                del self._modules[layer].forward

    def _stored_names(self) -> dict[int | None, list[str]]:
        """Return the names of the stored tensors by the decoder layer they go to; None for what stays in memory."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._mapping = get_model_conversion_mapping(self._model)
        renamings = [one for one in self._mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in self._mapping if isinstance(one, WeightConverter)]
        expected = self._model.state_dict()
        found: dict[int | None, list[str]] = {}
        for stored in self._checkpoint.reader.names:
            name, _ = rename_source_key(
                stored, renamings, converters, self._model.base_model_prefix, expected
            )
            if name not in expected and stored in expected:
                name = stored
            if name not in expected or not (self._head or name.startswith(f"{self._root}.")):
                continue
            rest = name.removeprefix(f"{self._layers}.")
            layer = None if rest == name else int(rest.partition(".")[0])
            found.setdefault(layer, []).append(stored)
        return found

    def _load_rest(self) -> None:
        """Load what is no decoder layer, and compute the buffers that are in no file."""
        model = self._model
        self._load(self._names.get(None, []))
        model._move_missing_keys_from_meta_to_device(set(), {"": self.device}, None, None)
        model._initialize_missing_keys(False)
        if self._head:
            model.tie_weights(recompute_mapping=False)
        model.requires_grad_(False)

    def _load(self, names: Iterable[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        options = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self._dtype,
            dtype_plan=self._model._get_dtype_plan(self._dtype),
            weight_mapping=self._mapping,
        )
        state = {name: StoredTensor(self._checkpoint.reader, name) for name in names}
        with _silent_bars():
            convert_and_load_state_dict_in_model(self._model, state, options)
        trim_heap()  # its threads leave as much free as was stored, each in a heap of its own


def _without_values(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return the model on the meta device, which has shapes and no values."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers import initialization as init

    config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=False)
    forget_quantisation(config)
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.set_experts_implementation("eager")  # the grouped product takes rows of a multiple of 16 bytes only
    return model


@contextmanager
def _silent_bars() -> Iterator[None]:
    """Show no progress bar of transformers for each layer that is loaded."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
