"""The wiring of lm-eval, with a stand-in for the package that records how it is called."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from globe.errors import ConfigError
from globe.evaluation.tasks import check_tasks, run_tasks


class Recorded:
    calls: list[dict[str, Any]]


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A package that knows the tasks `letters` and `words` and gives half of what the model's score is."""
    recorded = Recorded()
    recorded.calls = []

    class HFLM:
        def __init__(self, **kwargs: Any) -> None:
            self.kwargs = kwargs

    class TaskManager:
        def __init__(self, include_path: str | None = None) -> None:
            self.include_path = include_path
            self.all_tasks = ["letters", "words"]

    def simple_evaluate(*, model: HFLM, tasks: list[str], task_manager: TaskManager, **kwargs: Any) -> dict:
        recorded.calls.append({"model": model.kwargs, "include": task_manager.include_path, **kwargs})
        score = model.kwargs["pretrained"] / 2
        metrics = {
            "alias": "x",
            "sample_len": 3,
            "acc,none": score,
            "acc_stderr,none": "N/A",
            "perplexity,none": float("nan"),
        }
        return {"results": dict.fromkeys(tasks, metrics), "config": {}}

    package, models, hf, tasks = (
        ModuleType(name)
        for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    )
    package.simple_evaluate = simple_evaluate
    hf.HFLM = HFLM
    tasks.TaskManager = TaskManager
    for module in (package, models, hf, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: package if name == "lm_eval" else real(name, *a)
    )
    return recorded


def test_the_model_in_memory_is_what_lm_eval_gets(lm_eval: Recorded, tmp_path: Path) -> None:
    found = run_tasks(
        0.5, "tokenizer", ["letters", "words"], include_path=str(tmp_path), limit=3, batch=2, seed=9
    )
    assert found == {"letters": {"acc,none": 0.25}, "words": {"acc,none": 0.25}}
    (call,) = lm_eval.calls
    assert call["model"] == {"pretrained": 0.5, "tokenizer": "tokenizer", "batch_size": 2}
    assert call["include"] == str(tmp_path)
    assert call["limit"] == 3
    assert {value for name, value in call.items() if name.endswith("seed")} == {9}


def test_a_task_that_is_not_there_is_one_sentence(lm_eval: Recorded) -> None:
    check_tasks(["letters", "word"], None)
    with pytest.raises(ConfigError, match=r"tasks=\[word\] is not known to lm-eval"):
        run_tasks(0.5, None, ["letters", "word"])
    assert not lm_eval.calls


def test_a_folder_that_is_not_there_is_one_sentence(lm_eval: Recorded, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"include_path=.* is not a folder"):
        run_tasks(0.5, None, ["letters"], include_path=str(tmp_path / "nothing"))


def test_task_files_without_tasks_are_refused() -> None:
    check_tasks([], None)
    with pytest.raises(ConfigError, match=r"give tasks=\[\.\.\.\] as well"):
        check_tasks([], "tasks")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else spec(name, *a)
    )
    monkeypatch.setattr(builtins, "__import__", absent)
    for call in (lambda: check_tasks(["arc_easy"], None), lambda: run_tasks(0.5, None, ["arc_easy"])):
        with pytest.raises(
            ConfigError, match=r"tasks=\[arc_easy\] needs lm-eval.*pip install 'globe-moe\[eval\]'"
        ):
            call()
