"""One evaluation: open both models, score the text, and measure whatever the options ask for."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from globe.calibration.text import overlap, passages
from globe.evaluation.activation_error import LayerError, activation_errors
from globe.evaluation.divergence import divergence
from globe.evaluation.options import EvaluateOptions
from globe.evaluation.perplexity import WindowSums, perplexity, rise, score
from globe.evaluation.report import Evaluation, TaskScores
from globe.evaluation.sizes import measure_sizes
from globe.evaluation.spot_checks import Pair, SpotCheck, draw_places, spot_checks, tolerance
from globe.evaluation.subject import (
    Subject,
    check_model,
    load_tokenizer,
    open_subject,
    same_skeleton,
)
from globe.evaluation.tasks import check_tasks, run_tasks
from globe.evaluation.text import Tokens, Window, read_text, sliding_windows, tokenise
from globe.hf.run_banks import SOURCE_HASH
from globe.numerics.device import pick_device


@dataclass(frozen=True, slots=True, eq=False)
class _Material:
    """What all measurements share."""

    subject: Subject
    original: Subject | None
    tokens: Tokens
    windows: tuple[Window, ...]
    tokenizer: Any
    settings: dict[str, Any]
    device: torch.device
    model: Any
    dense: Any
    """the original in memory, or None"""
    comparable: bool
    """there is an original whose layers are those of the model, apart from the experts"""


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Everything that the options ask for. Raises GlobeError with one sentence."""
    clock = time.perf_counter()
    check_tasks(options.tasks, options.include_path)
    material = _prepare(options)
    sums = _score(material, options)
    dense = material.dense
    return Evaluation(
        model=options.model,
        original=None if material.original is None else material.original.name,
        settings=material.settings,
        perplexity=perplexity(sums.nll, sums, seed=options.seed),
        perplexity_original=(
            None if sums.nll_original is None else perplexity(sums.nll_original, sums, seed=options.seed)
        ),
        rise=None if dense is None else rise(sums, seed=options.seed),
        divergence=(
            None
            if sums.kl is None or sums.agreement is None
            else divergence(sums.kl, sums.agreement, sums.tokens, seed=options.seed)
        ),
        activation_errors=_activations(material, options),
        spot_checks=_spots(material, options),
        parity_tolerance=tolerance(next(material.model.parameters()).dtype),
        sizes=measure_sizes(material.subject, material.original, material.model, dense),
        tasks=_tasks(material, options, material.model),
        tasks_original={} if dense is None else _tasks(material, options, dense),
        seconds=time.perf_counter() - clock,
    )


def _prepare(options: EvaluateOptions) -> _Material:
    """Open, check and load everything; whatever is wrong is found before a large model is loaded."""
    device = pick_device(options.device)
    text = read_text(options.text)
    subject, original = open_subject(options.model, options.against)
    tokenizer = load_tokenizer(subject, original, options.tokenizer)
    tokens = tokenise(text.content, tokenizer, max_tokens=options.max_tokens)
    windows = sliding_windows(tokens.ids.shape[0], window=options.window, stride=options.stride)
    calibration = subject.calibration_passages
    shared = None
    if calibration is not None:
        shared = overlap(passages([tokenizer.decode(tokens.ids, skip_special_tokens=True)]), calibration)
    counted = [slice(one.stop - one.scored, one.stop) for one in windows]
    settings = asdict(options) | {
        "dtype": str(options.dtype),
        "device": str(device),
        "text_sha256": text.sha256,
        "calibration_overlap": shared,
        "tokens": tokens.ids.shape[0],
        "windows": len(windows),
        "counted_tokens": sum(one.scored for one in windows),
        "counted_bytes": sum(int(tokens.bytes[one].sum()) for one in counted),
        "versions": _versions(),
        "source": [source.get(SOURCE_HASH) for source in subject.sources],
    }
    dtype = options.dtype.dtype
    dense = None if original is None else original.load(dtype=dtype, device=device, S_cache=None)
    model = subject.load(dtype=dtype, device=device, S_cache=options.S_cache)
    check_model(model, int(tokens.ids.max()), options.window, original=dense)
    comparable = dense is not None and same_skeleton(model, dense)
    return _Material(
        subject, original, tokens, windows, tokenizer, settings, device, model, dense, comparable
    )


def _score(material: _Material, options: EvaluateOptions) -> WindowSums:
    with tqdm(total=len(material.windows), unit="window", disable=None, leave=False) as bar:
        return score(
            material.model,
            material.tokens,
            material.windows,
            original=material.dense,
            batch=options.batch,
            device=material.device,
            on_batch=bar.update,
        )


def _activations(material: _Material, options: EvaluateOptions) -> tuple[LayerError, ...]:
    if not material.comparable or not options.activation_windows:
        return ()
    # evenly over the text: its beginning alone may be of one kind
    step = max(1, len(material.windows) // options.activation_windows)
    return activation_errors(
        material.dense,
        material.model,
        material.tokens,
        material.windows[::step][: options.activation_windows],
        batch=options.batch,
        device=material.device,
    )


def _spots(material: _Material, options: EvaluateOptions) -> tuple[SpotCheck, ...]:
    if not material.comparable or not options.experts:
        return ()
    assert material.original is not None
    assert material.original.checkpoint is not None
    pair = Pair(material.subject, material.model, material.original.checkpoint, material.dense)
    places = draw_places(pair, options.experts, seed=options.seed)
    return spot_checks(pair, places, top_k=options.top_k, seed=options.seed)


def _tasks(material: _Material, options: EvaluateOptions, model: Any) -> TaskScores:
    if not options.tasks:
        return {}
    return run_tasks(
        model,
        material.tokenizer,
        options.tasks,
        include_path=options.include_path,
        limit=options.limit,
        batch=options.batch,
        seed=options.seed,
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("globe-moe", "torch", "transformers")}
