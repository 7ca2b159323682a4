"""The house: who may import whom, who may import a heavy package, and what an import really pulls in."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from globe.numerics.activation import phi

SOURCE = Path(__file__).parents[1] / "src" / "globe"
FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}

COMMANDS = ("train", "patch", "evaluate", "report", "inspect", "calibrate", "__init__", "__main__")
ROOMS: dict[str, tuple[str, ...]] = {
    # room: the rooms it may import, besides itself. Those of a row stand above it, so that imports go downwards only.
    "errors": (),
    "files": ("errors",),
    "embedded": (),
    "config": ("errors", "files"),
    "numerics": ("errors", "config"),
    "am": ("errors", "numerics"),
    "bank": ("errors", "files", "config", "numerics", "am"),
    "baselines": ("errors", "config", "numerics", "am", "bank"),
    "runs": ("errors", "files", "config", "numerics", "am", "bank"),
    "processes": ("errors", "files", "config", "numerics", "am", "runs"),
    "checkpoint": ("errors", "files", "embedded", "config", "numerics"),
    "calibration": ("errors", "files", "embedded", "config", "numerics", "checkpoint"),
    "fit": (
        "errors", "files", "config", "numerics", "am", "bank", "baselines", "runs", "processes", "checkpoint",
        "calibration",
    ),
    "sizes": ("errors", "files", "config", "numerics", "am", "bank", "runs", "checkpoint", "calibration", "fit"),
    "hf": ("errors", "files", "config", "numerics", "bank", "runs", "checkpoint", "calibration", "fit", "sizes"),
    "evaluation": (
        "errors", "files", "embedded", "config", "numerics", "bank", "runs", "checkpoint", "calibration", "hf",
    ),
    "inspection": ("errors", "files", "config", "numerics", "am", "bank", "runs", "checkpoint", "hf"),
    "reporting": ("errors", "files", "config", "numerics", "bank", "runs", "sizes", "evaluation"),
}  # fmt: skip

# Heavy or optional packages, and the only places that may import them (a prefix of the path inside `globe`).
ONLY_IN = {
    "wandb": ("runs/tracking",),
    "matplotlib": ("reporting/", "report.py"),
    "transformers": ("hf/", "evaluation/", "calibration/", "evaluate.py", "calibrate.py"),
    "accelerate": ("hf/", "evaluation/", "calibration/"),
    "lm_eval": ("evaluation/tasks.py",),
    "hydra": ("config/", "processes/", "runs/", "train.py"),
}

# Rooms of kernels: tensors in, tensors out. They know of no configuration file, model or tracker.
KERNELS = ("am/", "baselines/", "numerics/", "bank/compose.py", "fit/normalise.py")
FOREIGN_TO_KERNELS = ("hydra", "omegaconf", "wandb", "matplotlib", "transformers")
LONGEST_FILE, LONGEST_FUNCTION, MOST_ARGUMENTS = 350, 60, 10


def room_of(module: str) -> str:
    """The room of a dotted name below `globe`: its folder, or the module itself where it has none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


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


def rooms_imported(name: str) -> Iterator[str]:
    """Rooms other than its own that the file `name` imports, inside functions too."""
    own = name.split("/")[0].removesuffix(".py")
    for one in imports_of(FILES[name].read_text(), name):
        if one.startswith("globe.") and (room := room_of(one)) != own:
            yield room


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


def test_every_file_has_a_room() -> None:
    rooms = {name.split("/")[0].removesuffix(".py") for name in FILES}
    assert rooms <= {*ROOMS, *COMMANDS}, (
        "a new module goes into a room of the table, or the table gets a new room"
    )


def test_contributing_shows_every_room_in_order_and_names_files_that_exist() -> None:
    page = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text()
    tree = page.split("src/globe/\n", 1)[1].split("```")[0]
    lines = [line for line in tree.splitlines() if line.startswith("  ")]
    commands, rooms = lines[0].split("   ")[0].split(), [line.split()[0] for line in lines[1:]]
    assert sorted(name.removesuffix(".py") for name in commands) == sorted(
        one for one in COMMANDS if not one.startswith("__")
    )
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    top = [room.rstrip("/").removesuffix(".py") for room in rooms if room != "dictionary/"]
    assert top == list(ROOMS), "CONTRIBUTING.md shows the rooms in the order of the table"
    assert folders <= set(top)
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines), (
        "each room has a line that says what it is"
    )
    for row in page.split("| new |")[1].split("\n\n")[0].splitlines()[2:]:
        _, _, where, word, held, _ = row.split("|")
        for name in re.findall(r"`([\w/]+\.py|[\w/]+/)[`A-Z]?", where + word):
            assert (SOURCE / name).exists(), name
        assert (SOURCE.parents[1] / held.strip().strip("`")).is_file(), held


def test_the_table_goes_downwards_only() -> None:
    order = list(ROOMS)
    upwards = [
        (room, one) for room, below in ROOMS.items() for one in below if order.index(one) >= order.index(room)
    ]
    assert not upwards


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_the_rooms_below_it(room: str) -> None:
    offenders = {
        f"{name} -> {other}"
        for name in FILES
        if name.split("/")[0].removesuffix(".py") == room
        for other in rooms_imported(name)
        if other not in ROOMS[room] and other != "__init__" and name != "baselines/export.py"
    }
    assert not offenders, f"{room} may import {ROOMS[room]}: move the definition down, or the caller up"


def test_modules_of_a_room_form_no_circle() -> None:
    """Imports that run at import, module by module, over the whole package."""
    modules = {"globe." + name.removesuffix(".py").replace("/", "."): name for name in FILES}
    modules = {module.removesuffix(".__init__"): name for module, name in modules.items()}
    arrows = {
        module: {
            one
            for one, runs in imports_of(FILES[name].read_text(), name).items()
            if runs
            and one in modules
            and not module.startswith(f"{one}.")  # the package a module lies in is there
        }
        for module, name in modules.items()
    }
    ready: set[str] = set()
    while more := {
        module for module, needs in arrows.items() if module not in ready and needs - {module} <= ready
    }:
        ready |= more
    assert not set(arrows) - ready, "these modules import each other in a circle"


@pytest.mark.parametrize("room", [room for room in ROOMS if (SOURCE / room).is_dir()])
def test_a_room_says_what_it_is_for(room: str) -> None:
    text = ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text()))
    assert text, f"src/globe/{room}/__init__.py has no docstring"
    assert text.split("\n\n")[0].rstrip().endswith(".")


def test_no_file_holds_two_ideas() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def functions_of(name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def arguments_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of the arguments a caller gives: not self and cls, and `*more` and `**more` once each."""
    own = function.args
    named = [one.arg for one in (*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg) if one]
    return [name for name in named if name not in ("self", "cls")]


def test_every_function_fits_on_a_page() -> None:
    long = {
        f"{name}:{function.name}": lines
        for name in FILES
        for function in functions_of(name)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > LONGEST_FUNCTION
    }
    assert not long, f"a function has at most {LONGEST_FUNCTION} lines with its docstring"


def test_no_call_has_to_name_many_arguments() -> None:
    many = {
        f"{name}:{function.name}": len(arguments_of(function))
        for name in FILES
        for function in functions_of(name)
        if len(arguments_of(function)) > MOST_ARGUMENTS
    }
    assert not many, f"a function takes at most {MOST_ARGUMENTS} arguments: group those that belong together"


def test_arguments_are_counted_as_a_caller_gives_them() -> None:
    source = "class A:\n    def f(self, a, /, b, *c, d=1, **e): ..."
    (function,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    assert arguments_of(function) == ["a", "b", "d", "c", "e"]


@pytest.mark.parametrize("package", ONLY_IN)
def test_package_is_imported_only_where_it_belongs(package: str) -> None:
    offenders = [
        name
        for name, path in FILES.items()
        if reaches(imports_of(path.read_text(), name), package) and not name.startswith(ONLY_IN[package])
    ]
    assert not offenders, f"{package} may be imported only by {ONLY_IN[package]}"


@pytest.mark.parametrize("kernel", [name for name in FILES if name.startswith(KERNELS)])
def test_kernel_imports_no_configuration_file_tracker_or_model(kernel: str) -> None:
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
        ("globe", ("torch", "transformers", "wandb", "matplotlib", "hydra")),
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
