"""One evaluation: score the text with a model beside its original, and measure whatever the options ask for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from globe.checkpoint.model_config import understood
from globe.config.console import progress_bar
from globe.evaluation.activation_error import LayerError, activation_errors
from globe.evaluation.divergence import divergence
from globe.evaluation.ground import Ground, arithmetic_of
from globe.evaluation.options import EvaluateOptions
from globe.evaluation.perplexity import WindowSums, perplexity, rise, score
from globe.evaluation.report import Evaluation, TaskScores
from globe.evaluation.sizes import measure_sizes
from globe.evaluation.spot_checks import Pair, SpotCheck, draw_places, spot_checks, tolerance
from globe.evaluation.subject import Subject, check_model, open_subject, same_skeleton
from globe.evaluation.tasks import check_tasks, run_tasks


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """One model on its ground."""

    subject: Subject
    ground: Ground
    model: Any
    comparable: bool
    """there is an original whose layers are those of the model, apart from the experts"""


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Measure everything that the options ask for, of the one model they name.

    Raises
    ------
    GlobeError with one sentence, before a large model is loaded if possible.
    """
    check_tasks(options.tasks, options.include_path)
    subject, original = open_subject(options.one_model(), options.against)
    return measure(subject, Ground(options, subject, original))


def measure(subject: Subject, ground: Ground, progress: str = "") -> Evaluation:
    """Measure one model on its ground; `progress` stands before the bar. Raises GlobeError with one sentence."""
    clock = time.perf_counter()
    options, dense = ground.options, ground.dense
    model = subject.load(dtype=options.dtype.dtype, device=ground.device, S_cache=options.S_cache)
    check_model(model, int(ground.tokens.ids.max()), options.window, original=dense)
    case = _Case(subject, ground, model, dense is not None and same_skeleton(model, dense))
    sums = _score(case, progress)
    return Evaluation(
        model=subject.name,
        original=None if ground.original is None else ground.original.name,
        settings=ground.settings(subject),
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
        activation_errors=_activations(case),
        spot_checks=_spots(case),
        parity_tolerance=tolerance(arithmetic_of(model)),
        arithmetic=str(arithmetic_of(model)).removeprefix("torch."),
        sizes=measure_sizes(subject, ground.original, model, dense),
        tasks=_tasks(case, model),
        tasks_original=ground.tasks(lambda original: _tasks(case, original)),
        seconds=time.perf_counter() - clock,
    )


def _score(case: _Case, progress: str) -> WindowSums:
    ground = case.ground
    with (
        progress_bar(len(ground.windows), "window", progress or None) as bar,
        understood(case.subject.folder, "run"),
    ):
        return score(
            case.model,
            ground.tokens,
            ground.windows,
            original=ground.dense,
            batch=ground.options.batch,
            device=ground.device,
            on_batch=bar.update,
            remembered=ground.remembered,
        )


def _activations(case: _Case) -> tuple[LayerError, ...]:
    ground, count = case.ground, case.ground.options.activation_windows
    if not case.comparable or not count:
        return ()
    # evenly over the text: its beginning alone may be of one kind
    step = max(1, len(ground.windows) // count)
    return activation_errors(
        ground.dense,
        case.model,
        ground.tokens,
        ground.windows[::step][:count],
        batch=ground.options.batch,
        device=ground.device,
    )


def _spots(case: _Case) -> tuple[SpotCheck, ...]:
    ground, options = case.ground, case.ground.options
    if not case.comparable or not options.experts:
        return ()
    assert ground.original is not None
    assert ground.original.checkpoint is not None
    pair = Pair(case.subject, case.model, ground.original.checkpoint, ground.dense)
    places = draw_places(pair, options.experts, seed=options.seed)
    return spot_checks(pair, places, top_k=options.top_k, seed=options.seed)


def _tasks(case: _Case, model: Any) -> TaskScores:
    options = case.ground.options
    if not options.tasks:
        return {}
    return run_tasks(
        model,
        case.ground.tokenizer,
        options.tasks,
        include_path=options.include_path,
        limit=options.limit,
        batch=options.batch,
        seed=options.seed,
    )
