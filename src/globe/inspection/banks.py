"""A run or a single bank from its files: sizes, figures, where it comes from, and whether every file is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from globe.bank.file import RECORD_FILE, TENSORS_FILE, BankArtefact, read_artefact
from globe.config.plain_yaml import read_yaml
from globe.errors import ArtefactError
from globe.runs.folder import RunFolder, State
from globe.runs.metric_lines import metric_lines
from globe.runs.summary import RunSummary, read_summary

_RUN_MARKS = ("status.json", "summary.json")


def is_banks(root: Path) -> bool:
    """Return whether it is a bank or the folder of a run."""
    return (
        (root / RECORD_FILE).is_file()
        or (root / "banks").is_dir()
        or any((root / one).is_file() for one in _RUN_MARKS)
    )


def inspect_banks(root: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return everything as plain JSON (kind `bank` or `run`), and what is damaged: file -> sentence.

    Every tensor is read and checked, and its file's hash compared. Never raises for a damaged file.
    """
    damaged: dict[str, str] = {}
    if (root / RECORD_FILE).is_file():
        artefact = _read(root, damaged)
        return {"kind": "bank", "banks": [_bank(root, artefact)]}, damaged
    return _run(RunFolder(root), damaged), damaged


def _run(folder: RunFolder, damaged: dict[str, str]) -> dict[str, Any]:
    status, summary = folder.status, read_summary(folder.summary_file)
    found = sorted(one for one in folder.banks.glob("*") if one.is_dir() and not one.name.startswith("."))
    banks = {one.name: _read(one, damaged) for one in found if one.suffix != ".partial"}
    _check_files(folder, summary, damaged)
    _check_summary(folder, summary, banks, damaged)
    failed = {} if summary is None else summary.failed
    whole = None
    if summary is not None:
        whole = {
            "source": summary.source,
            "parameters": summary.total_parameters,
            "kept": summary.kept if summary.banks else None,
            "kept_model": summary.kept_model(),
            "relfrob": summary.relfrob if summary.banks else None,
            "device": summary.device,
            "seconds": summary.seconds,
        }
    return {
        "kind": "run",
        "name": folder.path.resolve().name,
        "state": None if status is None else str(status.state),
        "error": None if status is None else status.error,
        "started": None if status is None else status.started,
        "ended": None if status is None else status.ended,
        "summary": whole,
        "failed": failed,
        "unfinished": [one.name.removesuffix(".partial") for one in found if one.suffix == ".partial"],
        "banks": [_bank(folder.bank(key), artefact) for key, artefact in banks.items()],
    }


def _read(folder: Path, damaged: dict[str, str]) -> BankArtefact | None:
    try:
        return read_artefact(folder)
    except ArtefactError as error:
        sentence = str(error)
        record = folder / RECORD_FILE
        file = record if sentence.startswith(str(record)) else folder / TENSORS_FILE
        damaged[str(file)] = sentence
        return None


def _bank(folder: Path, artefact: BankArtefact | None) -> dict[str, Any]:
    if artefact is None:
        return {"key": folder.resolve().name, "folder": str(folder), "intact": False}
    metrics = artefact.metrics or {}
    figures = metrics.get("metrics")
    scalars = {name: value for name, value in metrics.items() if isinstance(value, str | int | float | None)}
    return {
        "key": folder.resolve().name,
        "folder": str(folder),
        "intact": True,
        "members": [
            {"layer": one.layer, "family": one.family, "experts": len(one.experts)}
            for one in artefact.members
        ],
        **{name: getattr(artefact, name) for name in ("n", "p", "d", "m", "r", "atom_rank")},
        "activation": artefact.activation,
        "lam": artefact.lam,
        "dtype": str(artefact.codes.dtype).removeprefix("torch."),
        "seed": artefact.seed,
        "bytes": sum(tensor.nbytes for tensor in artefact.tensors().values()),
        "parameters": artefact.family_parameters,
        "kept_parameters": artefact.kept_parameters,
        "kept": artefact.kept_parameters / artefact.family_parameters,
        "source": artefact.source if isinstance(artefact.source, dict) else {},
        "figures": scalars | (figures if isinstance(figures, dict) else {}),
        "options": artefact.config or {},
    }


def _check_files(folder: RunFolder, summary: RunSummary | None, damaged: dict[str, str]) -> None:
    """Note which files of a run, besides its banks, are not what they should be."""
    again = "the same command of globe.train writes it anew"
    finished = folder.status is not None and folder.status.state is State.finished
    if folder.status is None:
        damaged[str(folder.status_file)] = f"{folder.status_file} is missing or can't be read: {again}"
    if summary is None and (finished or folder.summary_file.exists()):
        damaged[str(folder.summary_file)] = f"{folder.summary_file} is missing or can't be read: {again}"
    try:
        read_yaml(folder.config_file)
    except (OSError, ValueError):
        damaged[str(folder.config_file)] = f"{folder.config_file} is missing or can't be read: {again}"
    if finished and not _is_jsonl(folder.metrics_file):
        damaged[str(folder.metrics_file)] = (
            f"{folder.metrics_file} holds lines that are not JSON: its curves are cut"
        )


def _is_jsonl(file: Path) -> bool:
    try:
        return all(record is not None for record in metric_lines(file))
    except (OSError, ValueError):
        return False


def _check_summary(
    folder: RunFolder,
    summary: RunSummary | None,
    banks: dict[str, BankArtefact | None],
    damaged: dict[str, str],
) -> None:
    """Note banks that summary.json reports and that are not there, or have another error."""
    for report in () if summary is None else summary.banks:
        path = folder.bank(report.key)
        artefact = banks.get(report.key)
        if report.key not in banks:
            damaged[str(path)] = (
                f"{path} is missing, which summary.json reports: the same command learns it again"
            )
        elif artefact is not None and (artefact.metrics or {}).get("relfrob") != report.relfrob:
            damaged[str(folder.summary_file)] = (
                f"{folder.summary_file} and {path / RECORD_FILE} differ in relfrob: they are not of one run"
            )
