"""What stands beside the weights of a checkpoint: which of it belongs to a patched one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from globe.checkpoint.shards import INDEX, ShardReader
from globe.checkpoint.tensorfile import TensorFile
from globe.errors import CheckpointError
from globe.files import read_bytes, read_json, sync

RECORD = "globe_patch.json"
"""In every folder that patching writes: the banks that are in it, and what it replaces. Engines ignore it."""
_WEIGHTS = frozenset(
    (
        ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".npz",
        ".npy", ".tflite", ".ot", ".nemo", ".pkl", ".pickle",
    )
)  # fmt: skip
_DEEPEST = 4
_LONGEST_CODE = 1 << 20


def copy_support_files(reader: ShardReader, out: Path) -> tuple[str, ...]:
    """Copy what is beside the weights of a checkpoint into a folder; return the names of what is left out.

    Copied are config, tokenizer, licence, chat templates and the like, folders of them, and safetensors files of
    further tensors that no index names (`mtp.safetensors`). Left out are weights in other formats and folders with
    weights, copies of the checkpoint's own tensors, Python files that no configuration names, and what is no regular
    file. Hidden files are passed over without a word. Raises OSError if the disk refuses.
    """
    left_out = []
    code = _named_code(reader.folder)
    for path in sorted(reader.folder.iterdir()):
        name = path.name
        if name.startswith(".") or name in (INDEX, RECORD, *reader.files) or _holds(name, reader.files):
            continue
        if path.is_dir():
            if _is_free_of_weights(path):
                for file in _files_below(path):
                    copy_file(file, out / file.relative_to(reader.folder))
                continue
        elif _belongs(path, reader, code):
            copy_file(path, out / name)
            continue
        left_out.append(name + "/" * path.is_dir())
    return tuple(left_out)


def copy_file(source: Path, target: Path) -> None:
    """Copy and sync a file, not as a link if it is one: the hub's cache keeps links to blobs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    sync(target)


def _belongs(path: Path, reader: ShardReader, code: set[str]) -> bool:
    """Return whether a file in the folder itself belongs to a patched checkpoint."""
    if not path.is_file() or (path.suffix == ".py" and path.stem not in code):
        return False
    return not set(path.suffixes) & _WEIGHTS or _adds_tensors(path, reader)


def _holds(folder: str, files: tuple[str, ...]) -> bool:
    """Return whether shards of the checkpoint are in this folder below."""
    return any(name.startswith(f"{folder}/") for name in files)


def _is_free_of_weights(folder: Path) -> bool:
    """Return whether a folder has small files alone, such as `additional_chat_templates`."""
    if folder.is_symlink() or folder.name == "__pycache__":
        return False
    found = list(_walk(folder, _DEEPEST))
    return bool(found) and all(
        path.is_file() and path.suffix != ".py" and not set(path.suffixes) & _WEIGHTS for path in found
    )


def _files_below(folder: Path) -> Iterator[Path]:
    return (path for path in _walk(folder, _DEEPEST) if not path.name.startswith("."))


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Yield everything below that is no folder to go into: links, files, and folders that are too deep."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and depth:
            yield from _walk(path, depth - 1)
        else:
            yield path


def _adds_tensors(path: Path, reader: ShardReader) -> bool:
    """Return whether a file has tensors that the checkpoint lacks, and is no copy of the model in another form."""
    if path.suffix != ".safetensors" or path.name.startswith(("consolidated", "adapter_model", "model")):
        return False
    try:
        return not any(name in reader for name in TensorFile(path).entries)
    except CheckpointError:
        return False


def _named_code(folder: Path) -> set[str]:
    """Return the modules of remote code named by a configuration's `auto_map`, and what these import beside them."""
    waiting = set()
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        try:
            waiting |= _modules(read_json(folder / name, strict=False))
        except (OSError, ValueError):
            continue
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        found.add(module)
        try:
            text = read_bytes(folder / f"{module}.py", _LONGEST_CODE).decode("utf-8", "replace")
        except (OSError, ValueError):
            continue
        waiting |= set(re.findall(r"^\s*from\s+\.(\w+)\s+import\b", text, flags=re.MULTILINE)) - found
    return found


def _modules(config: Any) -> set[str]:
    """Return the modules in `auto_map`: its values are "module.Class", or lists of them."""
    mapped = config.get("auto_map") if isinstance(config, dict) else None
    values = list(mapped.values()) if isinstance(mapped, dict) else []
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    modules = (re.fullmatch(r"(\w+)\.\w+", name) for name in names if isinstance(name, str))
    return {match[1] for match in modules if match}
