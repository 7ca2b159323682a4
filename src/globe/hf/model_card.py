"""What a patched folder says of itself: README.md, its model card, and recipe.yaml, which repeats the fit."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

from globe.calibration.run import RECORD as CALIBRATION
from globe.checkpoint import Checkpoint
from globe.errors import printable
from globe.files import read_record, write_text
from globe.hf.run_banks import BankEntry, run_of

CARD, RECIPE, ORIGINAL_CARD = "README.md", "recipe.yaml", "README-base-model.md"
_LARGEST_CARD = 1 << 20
_LICENCE = re.compile(r"^(license|license_name|license_link): *([\w.:/+-]+) *$", re.MULTILINE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FAMILIES = {
    ("gate", "up"): "both",
    ("down", "gate", "up"): "all",
    ("up",): "up",
    ("gate",): "gate",
    ("down",): "down",
}
_PACKAGES = ("globe-moe", "torch", "transformers")
_NOT_REPEATED = ("numerics_version",)


def write_card(
    folder: Path,
    form: str,
    entries: tuple[BankEntry, ...],
    checkpoint: Checkpoint,
    parameters: dict[str, Any],
) -> None:
    """Write README.md and recipe.yaml; a card of the original that was copied there is kept beside them."""
    card = folder / CARD
    original = ""
    if card.is_file() and not card.is_symlink() and card.stat().st_size <= _LARGEST_CARD:
        original = card.read_text(encoding="utf-8", errors="replace")
        card.replace(folder / ORIGINAL_CARD)
    write_text(folder / RECIPE, recipe(entries))
    write_text(card, card_of(form, entries, checkpoint, parameters, original))


def recipe(entries: tuple[BankEntry, ...]) -> str:
    """Return the options of the fits as a primary configuration of globe.train."""
    import yaml

    places = [(member.layer, member.family) for entry in entries for member in entry.members]
    families = tuple(sorted({family for _, family in places}))
    options = {key: value for key, value in entries[0].config.items() if key not in _NOT_REPEATED}
    if isinstance(calibration := options.get("calibrate"), dict):  # a path of the machine that made this
        options["calibrate"] = {
            key: value for key, value in calibration.items() if key not in ("text", "tokenizer")
        }
    watched = read_record(run_of(entries[0].folder) / CALIBRATION)
    if watched is not None:
        options["calibrate"] = {
            key: watched[key] for key in ("tokens", "gradient_tokens", "window", "dtype") if key in watched
        }
    text = "" if watched is None else " calibrate.text=TEXT"
    chosen: dict[str, Any] = {"layer": sorted({layer for layer, _ in places})}
    if families in _FAMILIES:
        chosen["family"] = _FAMILIES[families]
    body = yaml.safe_dump(chosen | options, sort_keys=False, allow_unicode=True)
    return (
        "# python -m globe.train --config-dir FOLDER_OF_THIS_FILE --config-name recipe model.path=ORIGINAL"
        f"{text}\ndefaults:\n  - config\n  - _self_\n{body}"
    )


def card_of(
    form: str,
    entries: tuple[BankEntry, ...],
    checkpoint: Checkpoint,
    parameters: dict[str, Any],
    original: str,
) -> str:
    """Return the text of README.md."""
    source = checkpoint.source()
    name = str(source["id"])
    on_hub = bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()
    base = name if on_hub else printable(Path(name).name)
    head = ["---"]
    if on_hub:
        head += [f"base_model: {name}"]
    head += ["base_model_relation: quantized", "library_name: transformers"]
    head += [f"{key}: {value}" for key, value in _LICENCE.findall(_front_matter(original))]
    head += ["tags:", "- globe", "- mixture-of-experts", "- compressed", f"- {checkpoint.model_type}", "---"]
    revision = f", revision {source['revision']}" if source.get("revision") else ""
    loading = _LOADING_COMPACT if form == "globe" else _LOADING_DENSE
    return "\n".join([*head, "", f"# {base}, compressed by GloBE", ""]) + _BODY.format(
        base=f"{base}{revision}",
        model_type=checkpoint.model_type,
        form=form,
        stand=_STAND[form] + _dequantised(checkpoint),
        families=", ".join(sorted({member.family for entry in entries for member in entry.members})),
        layers=len({member.layer for entry in entries for member in entry.members}),
        kept=100 * parameters["kept_of_families"],
        of_model=100 * parameters["kept_of_model"],
        before=parameters["families"],
        after=parameters["kept"],
        banks=_table(entries),
        method=printable(str(entries[0].config.get("method", "unknown"))),
        seed=entries[0].config.get("seed", "unknown"),
        metric=printable(str((entries[0].config.get("normalise") or {}).get("metric", "none"))),
        versions=", ".join(f"{one} {importlib.metadata.version(one)}" for one in _PACKAGES),
        python=platform.python_version(),
        loading=loading,
    )


def _dequantised(checkpoint: Checkpoint) -> str:
    """Return what became of a quantised original."""
    if checkpoint.quantisation is None:
        return ""
    dtype = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    return f" The original is quantised ({checkpoint.quantisation}); here all its weights are {dtype}."


def _front_matter(card: str) -> str:
    """Return the YAML head of a model card, as text: it is never parsed."""
    return card.split("\n---", 1)[0] if card.startswith("---\n") else ""


def _table(entries: tuple[BankEntry, ...]) -> str:
    rows = ["| bank | atoms m | rows r | atom rank | RelFrob |", "|---|---|---|---|---|"]
    for entry in entries:
        layout = entry.layout
        rank = "dense atoms" if layout.atom_rank is None else layout.atom_rank
        rows.append(f"| {entry.key} | {layout.m} | {layout.r} | {rank} | {entry.relfrob} |")
    return "\n".join(rows)


_BODY = """
Expert matrices of {base} ({model_type}), approximated by basis banks: `{families}` of {layers} layers. {stand}

| | |
|---|---|
| parameters of the compressed families | {before:,} became {after:,} ({kept:.1f} %) |
| parameters of the model, so counted | {of_model:.1f} % |
| method, metric, seed | {method}, {metric}, {seed} |
| made with | {versions}, Python {python} |

Figures of quality are in `evaluation.json` once `python -m globe.evaluate model=THIS_FOLDER` has measured them.

## Loading it

{loading}

## The banks

{banks}

## Making it again

    python -m globe.train --config-dir THIS_FOLDER --config-name recipe model.path=ORIGINAL
    python -m globe.patch run=RUN out=FOLDER format={form}

## Sharing it

    hf auth login
    hf upload USER/NAME THIS_FOLDER --private

makes the repository, and goes on where it was interrupted. `hf repos settings USER/NAME --public` opens it to everyone.
"""
_STAND = {
    "dense": "This folder holds the reconstructed matrices.",
    "globe": "This folder holds the factors.",
}
_LOADING_DENSE = """It has the names and shapes of the original, so every engine loads it; nothing is smaller.

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(FOLDER)

    vllm serve FOLDER"""
_LOADING_COMPACT = """It holds factors instead of matrices: `pip install globe-moe`, then

    import globe
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(FOLDER)       # or globe.load(FOLDER)

    pip install globe-vllm && vllm serve FOLDER"""
