"""Where a model keeps its expert matrices: one JSON file per `model_type` in `architectures/`, read here.

A new architecture is one such file and no code. The templates are tensor names with `{layer}` and, when every
expert has its own tensor, `{expert}`. An architecture may be written in more than one layout (transformers
can save a Mixtral under its upstream names or as it stands in memory), so a file lists them all and the
reader takes the one whose tensors exist.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from globe.errors import CheckpointError

FAMILIES = ("gate", "up", "down")
PREFIXES = (
    *("model.", "", "model.language_model.", "language_model.model.", "language_model.", "model.model."),
    *("model.backbone.", "transformer.transformer."),
)
"""What stands before `layers.` or `blocks.` in tensor names, by how a model was saved: transformers reads all."""
_HEAD = re.compile(r"^(?:language_model\.|model\.|backbone\.|transformer\.)*(?=(?:layers|blocks)\.)")
_FOLDER = Path(__file__).parent / "architectures"


@dataclass(frozen=True, slots=True)
class Slot:
    """How one family is stored: which tensors, and which part of them.

    Every family comes as (p, d) = (I, H), with I the intermediate and H the hidden size: gate and up as they
    multiply a column of activations, down with its axes exchanged. So a bank stands on the hidden side of all three.
    """

    template: str
    """Tensor name with `{layer}`, and `{expert}` if each expert has its own."""
    half: int | None
    """None: the tensor holds this family alone. 0 or 1: first or second half of a tensor of gate and up."""
    transposed: bool
    """The tensor holds the (p, d) matrix with its two axes exchanged."""
    interleaved: bool
    """The halves alternate row by row, rather than follow each other."""
    stacked: bool = False
    """The tensor holds the (p, d) matrices of all experts one below the other: its rows are n times p."""

    @property
    def fused(self) -> bool:
        """All experts in one tensor."""
        return "{expert}" not in self.template

    def name(self, layer: int, expert: int) -> str:
        return self.template.format(layer=layer, expert=expert)


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of the tensors of one way to store experts. `gate_up` stands in for `gate` and `up`."""

    down: str
    up: str | None = None
    gate: str | None = None
    """None, together with no `gate_up`: the experts have no gate."""
    gate_up: str | None = None
    transposed: bool = False
    interleaved: bool = False
    stacked: bool = False
    """The (I, H) matrices of all experts, those of down too, stand one below the other in one tensor."""

    def slot(self, family: str) -> Slot | None:
        """Return where `family` ("gate", "up" or "down") is; None if the experts have no such matrix."""
        if family not in FAMILIES:
            raise CheckpointError(f"family={family!r} is unknown: choose one of {', '.join(FAMILIES)}")
        if self.gate_up is not None and family != "down":
            return Slot(self.gate_up, int(family == "up"), self.transposed, self.interleaved)
        template: str | None = getattr(self, family)
        if self.stacked:
            return None if template is None else Slot(template, None, False, False, stacked=True)
        # files hold down as (H, I) where they hold gate and up as (I, H)
        transposed = self.transposed != (family == "down")
        return None if template is None else Slot(template, None, transposed, False)


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """Keys of `config.json` that say what the tensors must agree with, dotted where they are nested.

    Of several keys the first that is there counts (writers differ in how they call a size); the tensors
    decide where there is none.
    """

    layers: tuple[str, ...]
    experts: tuple[str, ...]
    rows: tuple[str, ...]
    """The intermediate size I, which is p."""
    columns: tuple[str, ...]
    """The hidden size H, which is d."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names and orientation of the experts of one `model_type`."""

    model_type: str
    layouts: tuple[Layout, ...]
    """Layouts of the routed experts, the upstream one first."""
    shared: Layout | None
    """Layout of the always-on shared expert, if there is one; its templates have no `{expert}`."""
    config: ConfigKeys
    dense_only: str | None = None
    """Why a model can't run with factors in the place of its experts, where transformers keeps them in its own way."""


def with_prefix(architecture: Architecture, prefix: str) -> Architecture:
    """Return the architecture with what stands before its layers in tensor names replaced by `prefix`."""

    def renamed(layout: Layout) -> Layout:
        names = {key: getattr(layout, key) for key in ("down", "up", "gate", "gate_up")}
        changed: Any = {key: _HEAD.sub(prefix, name) for key, name in names.items() if name is not None}
        return replace(layout, **changed)

    return replace(
        architecture,
        layouts=tuple(renamed(one) for one in architecture.layouts),
        shared=None if architecture.shared is None else renamed(architecture.shared),
    )


def known_model_types() -> tuple[str, ...]:
    """Return every `model_type` that has a file in `architectures/`, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


@functools.cache
def load_architecture(model_type: str) -> Architecture:
    """Return the architecture of a `model_type`. Raises CheckpointError if there is none or its file is malformed."""
    known = known_model_types()
    if model_type not in known:
        nearest = difflib.get_close_matches(model_type[:40], known, n=3, cutoff=0.0)
        raise CheckpointError(
            f"model_type={model_type[:40]!r} is none of the {len(known)} architectures GloBE knows (nearest: "
            f"{', '.join(nearest)}): add {model_type[:40]}.json to {_FOLDER}"
        )
    path = _FOLDER / f"{model_type}.json"
    return parse_architecture(path.read_text(encoding="utf-8"), str(path), model_type)


def parse_architecture(text: str, where: str, model_type: str) -> Architecture:
    """Check and build one architecture from its JSON text; `where` names the file in errors.

    Raises CheckpointError for malformed JSON, an unknown or missing key, a template without its placeholders,
    or a file that describes another `model_type` than its name.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where} is not JSON ({error}): correct it") from error
    _check_keys(record, Architecture, where, optional={"shared", "dense_only"})
    if record["model_type"] != model_type:
        raise CheckpointError(f"{where} describes {record['model_type']!r}: rename it, or correct model_type")
    if not isinstance(record["layouts"], list) or not record["layouts"]:
        raise CheckpointError(f"{where} has no layouts: give a list of at least one")
    shared, dense_only = record.get("shared"), record.get("dense_only")
    if not isinstance(dense_only, str | None):
        raise CheckpointError(f"{where}: dense_only={dense_only!r} must be a reason, or null")
    return Architecture(
        model_type=model_type,
        layouts=tuple(_layout(one, f"{where}: layouts") for one in record["layouts"]),
        shared=None if shared is None else _layout(shared, f"{where}: shared", shared=True),
        config=_config_keys(record["config"], f"{where}: config"),
        dense_only=dense_only,
    )


def _layout(record: Any, where: str, *, shared: bool = False) -> Layout:
    flags = {"transposed", "interleaved", "stacked"}
    _check_keys(record, Layout, where, optional={field.name for field in fields(Layout)} - {"down"})
    for key, value in record.items():
        if key in flags:
            if not isinstance(value, bool):
                raise CheckpointError(f"{where}: {key}={value!r} must be true or false")
            continue
        found = set(re.findall(r"\{(\w*)\}", value)) if isinstance(value, str) else set()
        if "layer" not in found or not found <= ({"layer"} if shared else {"layer", "expert"}):
            raise CheckpointError(f"{where}: {key}={value!r} must be a tensor name with {{layer}} in it")
    if ("gate_up" in record) == ("up" in record) or {"gate_up", "gate"} <= set(record):
        raise CheckpointError(f"{where}: give either gate_up, or up with or without gate")
    if record.get("interleaved") and "gate_up" not in record:
        raise CheckpointError(f"{where}: interleaved says how gate_up is laid out, so it needs gate_up")
    layout = Layout(**record)
    if layout.stacked and (
        layout.gate_up or layout.transposed or any("{expert}" in str(one) for one in record.values())
    ):
        raise CheckpointError(
            f"{where}: stacked says that a tensor holds one family of all experts: leave out the others"
        )
    return layout


def _config_keys(record: Any, where: str) -> ConfigKeys:
    """Read the keys of the configuration: each is a key, a list of keys of which the first present counts, or null."""
    _check_keys(record, ConfigKeys, where, optional=set())
    keys = {}
    for field, value in record.items():
        listed = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise CheckpointError(f"{where}: {field}={value!r} must be a key of config.json, a list, or null")
        keys[field] = tuple(listed)
    return ConfigKeys(**keys)


def _check_keys(record: Any, kind: type, where: str, *, optional: set[str]) -> None:
    known = {field.name for field in fields(kind)}
    if not isinstance(record, dict):
        raise CheckpointError(f"{where} must be an object with the keys {', '.join(sorted(known))}")
    if unknown := set(record) - known:
        raise CheckpointError(
            f"{where} has the unknown key {min(unknown)!r}: the keys are {', '.join(sorted(known))}"
        )
    if missing := known - optional - set(record):
        raise CheckpointError(f"{where} lacks the key {min(missing)!r}")
