"""The `globe_*` model types reach transformers' table in either order of imports, and nothing else is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import globe
from globe.checkpoint import known_model_types
from globe.checkpoint.model_config import PREFIX

SOURCE = Path(globe.__file__).parents[1]
TABLE = """
class AutoConfig:
    names = []
    @staticmethod
    def register(name, config, exist_ok=False):
        assert exist_ok and config.model_type == name
        AutoConfig.names.append(name)
"""
CHECK = """
import inspect, importlib, json
table = importlib.import_module("transformers.models.auto.configuration_auto")
assert inspect.getsource(table.AutoConfig).startswith("class AutoConfig")
assert table.__spec__.name == table.__name__
assert not any(name.startswith("torch") for name in sys.modules)
print(json.dumps(sorted(table.AutoConfig.names)))
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A package called transformers with nothing but the table, so that importing it takes no time."""
    folder = tmp_path / "transformers" / "models" / "auto"
    folder.mkdir(parents=True)
    for parent in (folder, folder.parent, folder.parents[1]):
        (parent / "__init__.py").write_text("")
    (folder / "configuration_auto.py").write_text(TABLE)
    return tmp_path


@pytest.mark.parametrize(
    "order",
    [
        "from globe.hf.register import install; install(); install()",
        "import transformers.models.auto.configuration_auto\nfrom globe.hf.register import install; install()",
        "import transformers\nfrom globe.hf.register import install; install()",
    ],
)
def test_registered_in_any_order_of_imports(order: str, fake: Path) -> None:
    code = f"import sys\nsys.path[:0] = {[str(fake), str(SOURCE)]!r}\n{order}\n{CHECK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    names = {PREFIX + name for name in known_model_types()}
    assert set(json.loads(done.stdout)) == names


TWICE = """
import sys, importlib
import globe.hf.register as first
first.install()
first_finder = sys.meta_path[0]
del sys.modules["globe.hf.register"]
second = importlib.import_module("globe.hf.register")
assert second._AfterImport is not type(first_finder)
second.install()
assert sum(type(finder).__name__ == "_AfterImport" for finder in sys.meta_path) == 1
sys.meta_path.insert(0, second._AfterImport())  # as an earlier version left it
"""


def test_a_module_that_is_loaded_twice_registers_and_does_not_recurse(fake: Path) -> None:
    code = f"import sys\nsys.path[:0] = {[str(fake), str(SOURCE)]!r}\n{TWICE}\n{CHECK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert PREFIX + "qwen2_moe" in json.loads(done.stdout)
