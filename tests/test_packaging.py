"""The project's own files agree with each other: versions, make targets, hooks, and what a wheel must hold."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def test_constraints_without_torch_differ_by_torch_alone() -> None:
    exact, without = pins("constraints.txt"), pins("constraints-notorch.txt")
    assert exact.pop("torch")
    assert exact == without


EXTRAS = PROJECT["optional-dependencies"]
PINNED = {one for name in ("dev", "joblib", "submitit", "slurm", "optuna", "ray") for one in EXTRAS[name]}


@pytest.mark.parametrize("line", sorted({*PROJECT["dependencies"], *PINNED}))
def test_dependency_is_pinned_inside_its_range(line: str) -> None:
    requirement = Requirement(line)
    assert requirement.specifier.contains(pins("constraints.txt")[canonicalize_name(requirement.name)])


def test_the_tests_install_every_plugin_that_they_run() -> None:
    for extra in ("joblib", "submitit", "optuna", "ray"):
        plugin = next(line for line in EXTRAS[extra] if line.startswith(("hydra-", "ray")))
        assert plugin in EXTRAS["dev"]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The tests themselves run under make, whose own flags must not reach this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_help_prints_every_target() -> None:
    targets = set(re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets >= {"help", "setup", "smoke-test", "test", "test-all", "lint", "types", "check", "golden"}
    assert {line.split()[0] for line in make("help").stdout.splitlines()} == targets


def test_missing_python_is_one_sentence(tmp_path: Path) -> None:
    done = make("setup", f"VENV={tmp_path / 'venv'}", "PYTHON=/nonexistent/python3.11")
    assert done.returncode != 0
    first = done.stderr.splitlines()[0]
    assert first.startswith("GloBE needs Python 3.11 or newer and none of '/nonexistent/python3.11' is")
    assert not (tmp_path / "venv").exists()


def test_nothing_that_the_package_needs_is_ignored_by_git() -> None:
    """An ignored file is missing from every clone and from the wheel, while all works where it was written."""
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--", "src", "conf", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    hidden = [name for name in done.stdout.splitlines() if "__pycache__" not in name]
    assert not hidden
