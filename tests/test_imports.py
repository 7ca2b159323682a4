"""Import direction: who may import what, read from the source, and what an import really pulls in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from globe.numerics.activation import phi

SOURCE = Path(__file__).parents[1] / "src" / "globe"
FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}

# Kernels: tensors in, tensors out. They know nothing of configuration files, trackers, models or checkpoints.
KERNELS = ("am/", "baselines/", "normalise.py", "warm_start.py", "seeding.py", "metrics.py", "compose.py")
FOREIGN_TO_KERNELS = (
    "hydra",
    "omegaconf",
    "wandb",
    "matplotlib",
    "transformers",
    "globe.checkpoint",
    "globe.runs.tracking",
    "globe.hf",
    "globe.train",
)

# Heavy or optional packages, and the only places that may import them (a prefix of the path inside `globe`).
ONLY_IN = {
    "wandb": ("tracking.py",),
    "matplotlib": ("report",),
    "transformers": ("hf/", "evaluate.py", "evaluation/"),
    "accelerate": ("hf/", "evaluate.py", "evaluation/"),
    "lm_eval": ("evaluation/tasks.py",),
    "torch": tuple(
        name for name in FILES if name not in ("choices.py", "composition.py", "config.py", "errors.py")
    ),
}


def imports_of(source: str, module: str) -> dict[str, bool]:
    """Dotted names that `source`, the text of `src/globe/<module>`, imports -> does an import of it run them?

    Imports inside a function do not run then; those under `if TYPE_CHECKING` run nowhere and do not count.
    `from a import b` gives both `a` and `a.b`, since b may be a module. Relative imports are made absolute.
    """
    found: dict[str, bool] = {}

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, at_import)
            return
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["globe", *module.split("/")[:-1]]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            found[name] = found.get(name, False) or at_import
        inside = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), True)
    return found


def reaches(names: dict[str, bool], package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in names)


def test_the_reader_of_imports_sees_every_form() -> None:
    source = """
from typing import TYPE_CHECKING
import torch.nn as nn
from . import objective
from ..checkpoint import shards
if TYPE_CHECKING:
    import matplotlib
try:
    import scipy
except ImportError:
    scipy = None
def f():
    from wandb import init
"""
    names = imports_of(source, "am/loop.py")
    assert names["torch.nn"]
    assert names["globe.am.objective"]
    assert names["globe.checkpoint.shards"]
    assert names["scipy"]
    assert names["wandb.init"] is False
    assert not reaches(names, "matplotlib")
    assert reaches(names, "globe.checkpoint")
    assert not reaches({"torchvision": True}, "torch")


@pytest.mark.parametrize("package", ONLY_IN)
def test_package_is_imported_only_where_it_belongs(package: str) -> None:
    offenders = [
        name
        for name, path in FILES.items()
        if reaches(imports_of(path.read_text(), name), package) and not name.startswith(ONLY_IN[package])
    ]
    assert not offenders, f"{package} may be imported only by {ONLY_IN[package]}"


@pytest.mark.parametrize("kernel", [name for name in FILES if name.startswith(KERNELS)])
def test_kernel_imports_no_configuration_tracker_model_or_checkpoint(kernel: str) -> None:
    names = imports_of(FILES[kernel].read_text(), kernel)
    foreign = [package for package in FOREIGN_TO_KERNELS if reaches(names, package)]
    assert not foreign, f"{kernel} is a kernel and must not import {foreign}"


@pytest.mark.parametrize(
    "package", ["wandb", "matplotlib", "transformers", "accelerate", "lm_eval", "scipy.optimize"]
)
def test_heavy_package_is_imported_inside_functions_only(package: str) -> None:
    """Each costs one to seven seconds at start, and no run needs all of them."""
    offenders = []
    for name, path in FILES.items():
        if name.startswith("hf/"):  # its classes derive from classes of transformers
            continue
        at_import = {one: True for one, runs in imports_of(path.read_text(), name).items() if runs}
        if reaches(at_import, package):
            offenders.append(name)
    assert not offenders, f"import {package} inside the function that needs it"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("globe.config.composition", ("torch", "transformers", "wandb", "matplotlib")),
        ("globe.train", ("transformers", "wandb", "matplotlib", "scipy.optimize")),
        ("globe.evaluate", ("transformers", "wandb", "matplotlib", "lm_eval")),
    ],
)
def test_importing_stays_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_shapes_and_dtypes_are_checked_under_test() -> None:
    with pytest.raises(TypeCheckError):
        phi(torch.zeros(2, 3, dtype=torch.int64), lam=0.5, activation="silu")
