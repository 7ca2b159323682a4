"""Hub ids: what is asked of huggingface_hub, and the sentence for each of its ways to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

import globe
import globe.embedded
from globe.checkpoint import open_checkpoint
from globe.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class ConnectError(Exception):
    """As HTTP libraries raise it: neither an OSError nor one of the hub's own errors."""


class Hub:
    """Stands in for `snapshot_download`: remembers the call, returns a folder or raises."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append((repo_id, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | Exception], Hub]:
    def install(answer: Path | Exception) -> Hub:
        stand_in = Hub(answer)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
        return stand_in

    return install


def test_a_hub_id_is_downloaded_and_its_commit_kept(
    hub: Callable[..., Hub], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tiny_checkpoint("qwen2_moe"), target_is_directory=True)
    calls = hub(snapshot).calls
    checkpoint = open_checkpoint("Qwen/Qwen1.5-MoE-A2.7B", revision="main", force_download=True)
    assert checkpoint.source() == {
        "id": "Qwen/Qwen1.5-MoE-A2.7B",
        "revision": COMMIT,
        "model_type": "qwen2_moe",
    }
    ((repo_id, options),) = calls
    assert repo_id == "Qwen/Qwen1.5-MoE-A2.7B"
    assert options["revision"] == "main"
    assert options["force_download"] is True


def test_all_but_weights_in_other_formats_is_asked_for(
    hub: Callable[..., Hub], tiny_checkpoint: Callable[..., Path]
) -> None:
    calls = hub(tiny_checkpoint("qwen2_moe")).calls
    globe.extract_expert_weights("owner/name", single_layer=0, max_experts=1)
    ((_, options),) = calls
    assert options["force_download"] is False
    files = {
        "config.json": True,
        "model.safetensors.index.json": True,
        "model-00001-of-00002.safetensors": True,
        "tokenizer.json": True,
        "tokenizer.model": True,
        "merges.txt": True,
        "chat_template.jinja": True,
        "pytorch_model.bin": False,
        "model.pt": False,
        "consolidated.safetensors": False,
        "consolidated.00.pth": False,
        "original/model.safetensors": False,
        "onnx/model.onnx": False,
        "modeling.py": True,
        "README.md": True,
        "tiktoken.model": True,
        "LICENSE": True,
        "additional_chat_templates/rag.jinja": True,
        "below/model-00001-of-00002.safetensors": False,
        "model.gguf": False,
    }
    kept = huggingface_hub.utils.filter_repo_objects(list(files), ignore_patterns=options["ignore_patterns"])
    assert set(kept) == {name for name, wanted in files.items() if wanted}
    assert "allow_patterns" not in options


def test_shards_in_a_folder_below_are_asked_for_by_their_names(
    hub: Callable[..., Hub], tmp_path: Path
) -> None:
    names = {"x": "below/a.safetensors", "y": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    calls = hub(tmp_path).calls
    with pytest.raises(CheckpointError):
        open_checkpoint("owner/name")
    assert [options.get("allow_patterns") for _, options in calls] == [None, ["below/a.safetensors"]]


def test_a_folder_wins_over_a_hub_id(
    hub: Callable[..., Hub],
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = hub(RuntimeError("the hub was asked")).calls
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(tiny_checkpoint("mixtral"), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/name").source()["id"] == "owner/name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/owner/name").model_type == "mixtral"
    assert calls == []
    with pytest.raises(
        CheckpointError, match=r"model\.revision='v1' is for hub ids, but owner/name is a folder"
    ):
        open_checkpoint("owner/name", revision="v1")


def answered(kind: type[Exception], status: int) -> Exception:
    """One of the hub's HTTP errors, built as it builds them."""
    library = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]
    response = library.Response(status, request=library.Request("GET", "https://hub"))
    return kind("several\nlines of\nexplanation", response=response)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (lambda: answered(errors.GatedRepoError, 403), "is gated: accept its terms on the hub and log in"),
        (lambda: answered(errors.RepositoryNotFoundError, 404), "nor a model on the hub open to you"),
        (lambda: answered(errors.RevisionNotFoundError, 404), "model.revision='v9' does not exist for a/b"),
        (
            lambda: answered(errors.HfHubHTTPError, 500),
            r"could not be downloaded \(HfHubHTTPError: several\)",
        ),
        (lambda: errors.LocalEntryNotFoundError("no\nway"), "out of reach or HF_HUB_OFFLINE is set"),
        (lambda: errors.HFValidationError("bad"), r"could not be downloaded \(HFValidationError: bad\)"),
        (lambda: OSError(28, "No space left on device"), "could not be downloaded .*No space left"),
        (lambda: ConnectError("refused"), r"could not be downloaded \(ConnectError: refused\)"),
        (lambda: RuntimeError(), r"could not be downloaded \(RuntimeError: no reason given\)"),
    ],
)
def test_every_failure_is_one_sentence(
    hub: Callable[..., Hub], error: Callable[[], Exception], sentence: str
) -> None:
    hub(error())
    with pytest.raises(CheckpointError, match=sentence) as caught:
        open_checkpoint("a/b", revision="v9")
    assert "\n" not in str(caught.value)


def test_a_cache_that_lacks_some_files_may_be_good_enough(
    hub: Callable[..., Hub], tiny_checkpoint: Callable[..., Path]
) -> None:
    """Offline, and downloaded by another program that left out, say, the generation config."""
    error = errors.LocalEntryNotFoundError("incomplete")
    error.snapshot_path = str(tiny_checkpoint("olmoe"))  # type: ignore[attr-defined]
    hub(error)
    assert open_checkpoint("a/b").model_type == "olmoe"


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./a/b", "../b", "a/b/c", "name", "a b/c", "", "~/absent"]
)
def test_neither_a_folder_nor_a_hub_id(hub: Callable[..., Hub], path: str) -> None:
    calls = hub(RuntimeError("the hub was asked")).calls
    with pytest.raises(CheckpointError, match="is neither a folder here nor a hub id"):
        open_checkpoint(path)
    assert calls == []


def test_a_file_for_a_folder() -> None:
    with pytest.raises(CheckpointError, match="is a file: give the folder that holds it"):
        open_checkpoint(str(globe.embedded.path() / "model.safetensors"))


def test_offline_is_respected_and_explained(tmp_path: Path) -> None:
    """The real library, no stand-in: with HF_HUB_OFFLINE it asks nobody, and its cache is empty here."""
    code = "import globe.checkpoint as c\ntry: c.open_checkpoint('a/b')\nexcept ValueError as e: print(e)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert "model.path='a/b' is neither a folder here nor in the hub cache" in done.stdout
    assert done.stdout.count("\n") == 1
