"""Runs to report: real folders of `globe.train`, with a fit that costs nothing, and evaluations as they are written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import globe.fit.one_bank
from globe.errors import FitError, GlobeError
from globe.evaluation.bootstrap import Interval
from globe.evaluation.divergence import Divergence
from globe.evaluation.perplexity import Perplexity, Rise
from globe.evaluation.report import Evaluation
from globe.evaluation.sizes import Change, ModelSizes
from globe.files import write_json
from globe.hf.footprint import Footprint
from globe.runs.folder import RunFolder, State
from run_support import FakeFit, run_in

STEPS = 4
OPTIONS = ("model.max_experts=6", "bank.r=11", f"train.steps={STEPS}")


def train(root: Path, *overrides: str, trouble: Callable[[int, int], None] | None = None) -> Path:
    """One run below `root`; errors are left to its status.json. Its banks are removed: nobody reads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(globe.fit.one_bank, "fit_bank", FakeFit(trouble or (lambda fit, step: None)))
        before = set(root.glob("*"))
        with suppress(GlobeError, KeyboardInterrupt):
            run_in(root, *OPTIONS, *overrides)
    (folder,) = set(root.glob("*")) - before
    shutil.rmtree(folder / "banks", ignore_errors=True)
    return folder


def interrupt(fit: int, step: int) -> None:
    if step == 2:
        raise KeyboardInterrupt


def fail(fit: int, step: int) -> None:
    raise FitError("this fit broke")


def make_sweep(root: Path) -> Path:
    """Three finished runs of two sizes, one failed, one interrupted, one that a kill left behind."""
    root.mkdir()
    for sizes in (("bank.m=2",), ("bank.m=3",), ("bank.m=3", "codes.target_support=2")):
        evaluate(train(root, *sizes), perplexity=9.0 - len(sizes))
    train(root, "bank.m=4", trouble=fail)
    train(root, "bank.m=1", trouble=interrupt)
    killed = RunFolder(root / "deeper" / "killed")
    killed.path.mkdir(parents=True)
    killed.begin({"seed": 3})
    failed = RunFolder(root / "a|b <i>")
    failed.path.mkdir()
    failed.begin({"seed": 4})
    failed.end(State.failed, "it <script>alert(1)</script> broke | badly\nin two lines")
    (root / "report").mkdir()
    (root / "multirun.yaml").write_text("hydra: {}\n")
    return root


def evaluate(folder: Path, *, perplexity: float) -> None:
    """evaluation.json as `globe.evaluate` writes it."""
    footprint = Footprint(1, 1, 1, 1)
    own = Perplexity(2.0, perplexity, Interval(perplexity - 0.5, perplexity + 0.5), 1.5, 0.6, None)
    evaluation = Evaluation(
        model=str(folder),
        original="globe-tiny",
        settings={"text": "embedded", "counted_tokens": 1234, "window": 256},
        perplexity=own,
        perplexity_original=Perplexity(1.9, 6.5, None, 1.4, 0.5, None),
        rise=Rise(0.1, ratio=perplexity / 6.5, ratio_interval=Interval(1.0, 1.5)),
        divergence=Divergence(0.01, None, 0.9, None),
        activation_errors=(),
        spot_checks=(),
        parity_tolerance=1e-3,
        arithmetic="float32",
        sizes=ModelSizes(
            ((12, "up"),), None, Change(1000, 900), None, Change(2000, 1900), 2000, footprint, footprint
        ),
        tasks={},
        tasks_original={},
        seconds=1.0,
    )
    write_json(folder / "evaluation.json", evaluation.to_dict())
