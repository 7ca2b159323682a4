"""What the tests of whole runs share: a composed configuration, a fit that costs nothing, a small checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from globe.am.options import FitOptions
from globe.am.records import Factors, FitResult, FitState, Sizes, StepRecord, StopReason
from globe.am.refit import refit
from globe.am.running import Progress
from globe.checkpoint import open_checkpoint
from globe.config.composition import conf_dir, plain, register
from globe.config.identity import run_name
from globe.embedded import path as embedded_path
from globe.numerics.group import ALONE, ProcessGroup
from globe.train import run

register()

EMBEDDED = open_checkpoint(None).shape(12, "up")
"""n, p and d of every up and gate family of the embedded model."""


def composed(*overrides: str) -> DictConfig:
    """The configuration that `python -m globe.train OVERRIDES` runs with."""
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        return compose("config", overrides=list(overrides))


def run_in(root: Path, *overrides: str) -> tuple[float, Path]:
    """Do a run in-process, in the folder that Hydra would give it below `root`."""
    node = composed(*overrides)
    folder = root / run_name(plain(node))
    return run(node, folder), folder


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def bytes_of(folder: Path, key: str) -> bytes:
    return (folder / "banks" / key / "bank.safetensors").read_bytes()


def small_checkpoint(target: Path) -> Path:
    """A writable copy of the embedded model."""
    shutil.copytree(embedded_path(), target)
    for file in target.iterdir():
        file.chmod(0o644)
    return target


def change_tensor(checkpoint: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = next(checkpoint.glob("*.safetensors"))
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


class FakeFit:
    """Stands in for `fit_bank`: random atoms, a random walk of `steps` steps, adapters by least squares.

    `trouble` is called with the number of the fit (from 0) and the step before each step, and may raise.
    """

    def __init__(self, trouble: Callable[[int, int], None] = lambda fit, step: None) -> None:
        self.trouble = trouble
        self.keys: list[tuple[int, ...]] = []
        self.resumed_at: list[int | None] = []

    @property
    def fits(self) -> int:
        return len(self.keys)

    def __call__(
        self,
        experts: torch.Tensor,
        sizes: Sizes,
        options: FitOptions,
        *,
        generator: torch.Generator,
        resume: FitState | None = None,
        on_step: Callable[[StepRecord], None],
        on_checkpoint: Callable[[FitState], None],
        group: ProcessGroup = ALONE,
        metric: object | None = None,
    ) -> FitResult:
        number = self.fits
        self.keys.append(tuple(experts.shape))
        self.resumed_at.append(None if resume is None else int(resume.numbers["step"] or 0))
        if resume is None:
            bank, step = torch.randn(sizes.m, sizes.r, sizes.d, generator=generator), 0
        else:
            bank, step = resume.tensors["bank"], int(resume.numbers["step"] or 0)
            generator.set_state(resume.tensors["generator"])
        while step < options.steps:
            self.trouble(number, step)
            bank = bank + 0.1 * torch.randn(bank.shape, generator=generator)
            step += 1
            on_step(step_record(step, relfrob=1 / (1 + step)))
            # like the real one it writes none after the last step
            if options.checkpoint_every == 0 and step < options.steps:
                state = {"bank": bank, "generator": generator.get_state()}
                on_checkpoint(FitState(state | _atoms(sizes), _numbers(step)))
        left = right = None
        if (k := sizes.atom_rank) is not None:
            u, s, vh = torch.linalg.svd(bank, full_matrices=False)
            left, right = u[..., :k] * s[..., None, :k], vh[..., :k, :]
            bank = left @ right
        codes = torch.rand(sizes.n, sizes.m, generator=generator) + 0.1
        bases = (codes @ bank.flatten(1)).view(sizes.n, sizes.r, sizes.d)
        adapters = refit(experts, bases).adapters
        return FitResult(
            Factors(bank, codes, adapters, left, right),
            lam=0.0,
            stop=StopReason.steps,
            steps=step,
            relfrob_start=0.9,
            relfrob=0.8,
            energy_captured=0.95,
            accepted=step,
            rejected=0,
            regularised_solves=0,
            seconds=0.25,
        )


def _atoms(sizes: Sizes) -> dict[str, torch.Tensor]:
    """Tensors that every state has; the fit that costs nothing does not look at them."""
    m, r, d, k = sizes.m, sizes.r, sizes.d, sizes.atom_rank
    bank = {"bank": (m, r, d)} if k is None else {"left": (m, r, k), "right": (m, k, d)}
    shapes = {"codes": (sizes.n, m)} | bank
    return {
        f"{name}.{field}": torch.ones(shape) for name in ("now", "anchor") for field, shape in shapes.items()
    }


def _numbers(step: int) -> dict[str, float | int | bool | str | None]:
    of_state = {"momentum_steps": 0, "damping": 1e-3, "lam": 0.0, "fine": False, "simplex": False}
    return asdict(Progress(1, 0.9, step=step)) | {f"state.{name}": one for name, one in of_state.items()}


def step_record(step: int, *, relfrob: float = 0.5) -> StepRecord:
    return StepRecord(
        step=step,
        seconds=0.1 * step,
        objective=relfrob**2,
        relfrob=relfrob,
        validation_relfrob=None,
        lam=0.0,
        beta=1.0,
        temperature=1.0,
        accepted=True,
        damping=1e-3,
        regularised_solves=0,
        support_median=3.0,
        support_mean=3.0,
        support_min=2,
        support_max=4,
        seconds_coding=0.01,
        seconds_dictionary=0.02,
        seconds_refit=0.03,
    )
