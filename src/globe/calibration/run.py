"""Calibrate a model: its decoder layers one after the other over windows of a text, each layer's statistics in a file.

The folder of a calibration holds `calibration.json`, which says what it is of, `layer-012.safetensors` for every layer
with experts, `output-012.safetensors` for what an error of its output costs, and, while it is not finished, the hidden
states after the layers done.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

import globe.embedded
from globe.calibration.collect import LayerSums, watched
from globe.calibration.decoder import Decoder
from globe.calibration.gradients import GradientPass, discard
from globe.calibration.hidden_states import HiddenStates, Progress
from globe.calibration.plan import GRADIENT_PART, Plan, plan_calibration
from globe.calibration.statistics import (
    FORMAT_VERSION,
    LayerStatistics,
    OutputWeights,
    is_complete,
    read_output,
    read_statistics,
    write_output,
    write_statistics,
)
from globe.calibration.text import Text, passages, read_file, read_tokenizer, spread_windows, tokenise
from globe.checkpoint import Checkpoint
from globe.config.calibrate_options import CalibrateConfig
from globe.config.choices import ExportDtype
from globe.config.console import progress_bar
from globe.errors import ArtefactError, ConfigError
from globe.files import clear_files, lock, read_record, write_json

RECORD = "calibration.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The statistics of a model on a text, in a folder. Layers are read when they are asked for."""

    folder: Path
    key: str
    """of model, text and sizes"""
    record: dict[str, Any]
    """what is in `calibration.json`"""

    def layer(self, layer: int) -> LayerStatistics:
        """Return the statistics of a layer. Raises ArtefactError if the layer has no statistics, or a damaged file."""
        found = read_statistics(self.file(layer), key=self.key)
        if not self.record["gradient_tokens"]:
            return found
        output = read_output(self.output_file(layer), key=self.key)
        if output.down.shape != found.rows_up.shape or len(output.F) != found.inputs.q:
            raise ArtefactError(f"{self.output_file(layer)} is damaged (sizes do not fit): calibrate again")
        return replace(found, output=output)

    def file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.safetensors"

    def output_file(self, layer: int) -> Path:
        return self.folder / f"output-{layer:03d}.safetensors"

    def has(self, layer: int) -> bool:
        """Return whether there is a whole file of a layer's statistics."""
        return is_complete(self.file(layer), key=self.key)

    def has_output(self, layer: int) -> bool:
        """Return whether what an error of a layer's output costs is there, or not asked for."""
        return not self.record["gradient_tokens"] or is_complete(self.output_file(layer), key=self.key)


def recorded_passages(folder: Path) -> frozenset[int] | None:
    """Return the passages of the calibration text that `calibration.json` in a folder lists; None if there is none."""
    record = read_record(folder / RECORD)
    found = None if record is None else record.get("passages")
    if not isinstance(found, list) or not all(isinstance(one, int) for one in found):
        return None
    return frozenset(found)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What is to be calibrated, before any of the model is read."""

    checkpoint: Checkpoint
    options: CalibrateConfig
    text: Text
    windows: Int[Tensor, "w t"]
    gradient_windows: Int[Tensor, "g t"]
    """those on which gradients are taken; none without them"""
    dtype: torch.dtype
    plan: Plan
    passages: frozenset[int]

    @property
    def key(self) -> str:
        """64 hexadecimal digits of model, windows, dtype and form."""
        digest = hashlib.sha256(fingerprint(self.checkpoint).encode())
        shapes = []
        for windows in (self.windows, self.gradient_windows):
            digest.update(windows.numpy().tobytes())
            shapes.append(list(windows.shape))
        sizes = [FORMAT_VERSION, *shapes, str(self.dtype), self.plan.rank]
        digest.update(json.dumps(sizes).encode())
        return digest.hexdigest()

    def record(self, key: str) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "key": key,
            "source": self.checkpoint.source(),
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "tokens": self.windows.numel(),
            "gradient_tokens": self.gradient_windows.numel(),
            "window": self.windows.shape[1],
            "dtype": str(self.dtype).removeprefix("torch."),
            "rank": self.plan.rank,
            "passages": sorted(self.passages),
        }


def calibrate(
    checkpoint: Checkpoint,
    options: CalibrateConfig,
    *,
    output: str | Path = "outputs",
    layers: Sequence[int] | None = None,
    device: torch.device | None = None,
    say: Callable[[str], None] = _log.info,
) -> Calibration:
    """Return the statistics of a model on `calibrate.text`, for some layers or all; what is on disk already is not
    repeated.

    A pass that was killed goes on with the layer it was in. Raises ConfigError for a text, a size or a folder that
    can't be used, CheckpointError for a model that can't be run layer by layer, ArtefactError when the disk refuses.
    """
    request = prepare(checkpoint, options)
    key = request.key
    folder = _folder(checkpoint, options, output, key)
    wanted = checkpoint.moe_layers if layers is None else tuple(sorted(set(layers)))
    with _held(folder):
        calibration = Calibration(folder, key, _recorded(folder, request, key))
        absent = [layer for layer in wanted if not calibration.has(layer)]
        unweighted = any(not calibration.has_output(layer) for layer in wanted)
        if absent or unweighted:
            say(request.plan.sentence)
            decoder = Decoder(
                checkpoint, dtype=request.dtype, device=device or torch.device("cpu"), head=unweighted
            )
            if absent:
                _run(calibration, request, decoder, max(absent))
            if unweighted:
                _weigh_outputs(calibration, request, decoder)
        # also what a pass left that was killed after its last layer
        if all(calibration.has(layer) for layer in checkpoint.moe_layers):
            HiddenStates(folder).clear()
        if all(calibration.has_output(layer) for layer in checkpoint.moe_layers):
            discard(folder)
    return calibration


def prepare(checkpoint: Checkpoint, options: CalibrateConfig) -> Request:
    """Read and tokenise the text, and plan the rest. Raises ConfigError."""
    if options.text is None:
        raise ConfigError("calibrate.text=null is no text: give a file, or embedded")
    text = read_file(options.text, embedded=globe.embedded.calibration_path(), option="calibrate.text")
    folder = checkpoint.folder if options.tokenizer is None else Path(options.tokenizer).expanduser()
    tokenizer = read_tokenizer(folder)
    ids = tokenise(text.content, tokenizer).ids
    windows = spread_windows(ids, window=options.window, tokens=options.tokens)
    few = windows[:0]
    if options.gradient_tokens:
        few = spread_windows(ids, window=options.window, tokens=min(options.tokens, options.gradient_tokens))
    _check_windows(checkpoint, windows)
    dtype = _dtype(checkpoint, options)
    plan = plan_calibration(
        checkpoint, options, tokens=windows.numel(), gradient_tokens=few.numel(), dtype=dtype
    )
    read = passages(tokenizer.decode(one, skip_special_tokens=True) for one in torch.cat([windows, few]))
    return Request(checkpoint, options, text, windows, few, dtype, plan, read)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash of a checkpoint's config, tensor names, shapes, dtypes, and the first row of every tensor."""
    reader = checkpoint.stored
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in sorted(reader.names):
        shape = reader.shape(name)
        row = reader.read(name, slice(0, 1) if shape else None)
        digest.update(f"{name} {shape} {row.dtype}".encode())
        digest.update(row.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_windows(checkpoint: Checkpoint, windows: Tensor) -> None:
    config = checkpoint.config.get("text_config", checkpoint.config)
    vocabulary, positions = config.get("vocab_size"), config.get("max_position_embeddings")
    if vocabulary is not None and int(windows.max()) >= vocabulary:
        raise ConfigError(
            f"the tokenizer gives token {int(windows.max())} and the model has {vocabulary}: give its own as "
            "calibrate.tokenizer"
        )
    if positions is not None and windows.shape[1] > positions:
        raise ConfigError(
            f"calibrate.window={windows.shape[1]} is more than the {positions} positions of the model: give at "
            "most that"
        )


def _dtype(checkpoint: Checkpoint, options: CalibrateConfig) -> torch.dtype:
    if options.dtype is not ExportDtype.auto:
        return getattr(torch, str(options.dtype))
    layer = checkpoint.moe_layers[0]
    return checkpoint.reader.dtype(checkpoint.locate(layer, "up", 0).tensor)


def _folder(checkpoint: Checkpoint, options: CalibrateConfig, output: str | Path, key: str) -> Path:
    if options.out is not None:
        return Path(options.out).expanduser()
    name = re.sub(r"[^A-Za-z0-9.+-]+", "-", Path(str(checkpoint.source()["id"])).name).strip("-") or "model"
    return Path(output).expanduser() / "calibration" / f"{name}_{key[:8]}"


def _recorded(folder: Path, request: Request, key: str) -> dict[str, Any]:
    """Return the record of the folder, written if there is none; what a kill left half written is removed.

    Raises ConfigError for a folder of something else.
    """
    record, fresh = read_record(folder / RECORD), request.record(key)
    named, layers = Calibration(folder, key, fresh), request.checkpoint.moe_layers
    files = [one for name in (named.file, named.output_file) for one in map(name, layers)]
    clear_files([folder / RECORD, *HiddenStates(folder).records, *files])
    if record is not None and record.get("key") == key:
        return fresh  # the same, or what stood there is damaged
    if any(one.name != ".lock" for one in folder.iterdir()):
        raise ConfigError(
            f"calibrate.out={str(folder)!r} holds something else, or the statistics of another model, text or size: "
            "give another folder"
        )
    write_json(folder / RECORD, fresh)
    return fresh


def _weigh_outputs(calibration: Calibration, request: Request, decoder: Decoder) -> None:
    """Write what errors of the outputs of all layers cost."""
    few = max(1, request.options.batch // GRADIENT_PART)

    def write(layer: int, weights: OutputWeights) -> None:
        write_output(weights, calibration.output_file(layer), layer=layer, key=calibration.key)

    gradients = GradientPass(decoder, request.gradient_windows, calibration.folder, batch=few)
    with progress_bar(2 * decoder.layers, "layer") as bar:
        gradients.run(calibration.has_output, write, lambda: bar.update(1))


def _run(calibration: Calibration, request: Request, decoder: Decoder, last: int) -> None:
    """Run the layers up to `last`, from where an earlier pass came to."""
    states = HiddenStates(calibration.folder)
    done = states.found()
    if done is not None:
        complete = all(calibration.has(layer) for layer in decoder.moe_layers if layer < done.next)
        done = done if complete else None
        decoder.wrapped = None if done is None else done.wrapped
    first = 0 if done is None else done.next
    batches = -(-request.windows.shape[0] // request.options.batch)
    with progress_bar((last + 1 - first) * batches, "batch") as bar:
        for layer in range(first, last + 1):
            done = _one_layer(calibration, request, decoder, layer, states, done, bar.update)


@torch.no_grad()
def _one_layer(
    calibration: Calibration,
    request: Request,
    decoder: Decoder,
    layer: int,
    states: HiddenStates,
    done: Progress | None,
    on_batch: Callable[[int], Any],
) -> Progress:
    """Run all windows through a layer; write its statistics, then the hidden states after it."""
    before = None if done is None else states.read(done)
    after: Tensor | None = None
    start = 0
    with decoder.loaded(layer), _statistics(calibration, request, decoder, layer):
        for ids in request.windows.split(request.options.batch):
            stop = start + ids.shape[0]
            given = None if before is None else before[start:stop].to(decoder.device, copy=True)
            output = decoder.step(layer, ids, given)
            if after is None:
                shape = (request.windows.shape[0], *output.shape[1:])
                after = states.create(layer + 1, shape, output.dtype)
            after[start:stop] = output.cpu()
            start = stop
            on_batch(1)
    assert after is not None
    progress = Progress(
        layer + 1, tuple(after.shape), str(after.dtype).removeprefix("torch."), decoder.wrapped
    )
    states.commit(progress)
    return progress


@contextmanager
def _statistics(calibration: Calibration, request: Request, decoder: Decoder, layer: int) -> Iterator[None]:
    """Watch the experts of a loaded layer, if it has any, and write their statistics at the end."""
    if layer not in decoder.moe_layers:
        yield
        return
    module, view = decoder.experts(layer)
    sums = LayerSums(layer, view, rank=request.plan.rank)
    with watched(module, sums):
        yield
    write_statistics(sums.finish(), calibration.file(layer), key=calibration.key)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder; another process with the same calibration waits, and then finds it done."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder / ".lock", wait=True))
        except OSError as error:
            raise ConfigError(
                f"calibrate.out={str(folder)!r} can't be used ({error.strerror}): give another folder"
            ) from error
        yield
