"""What a bank is learned from and how large it is: the groups `model`, `normalise`, `bank` and `budget`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from globe.config.checks import check, positive
from globe.config.choices import Activation, Centre, Metric, Over, SampleMethod, Scale, Scope, Store
from globe.errors import ConfigError


@dataclass
class ModelConfig:
    path: str | None = None
    """Checkpoint directory or Hugging Face hub id; null is the embedded model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null is the default branch."""
    force_download: bool = False
    """Download again even if the hub cache has the files."""
    include_shared: bool = False
    """Take the always-on shared expert too; refused where it is not of the size of a routed one."""
    size: str | None = None
    """Size of the files of the whole model once it is compressed (`globe.patch format=globe`), such as 1.9GB, 800MB,
    2GiB or a number of bytes, in the place of `bank.size`: what is no expert counts first. Null is no such limit."""
    max_experts: int | None = None
    """Use at most this many routed experts per layer; null is all."""
    sample_method: SampleMethod = SampleMethod.first_n
    """Which experts `max_experts` keeps: the first ones, or evenly spaced ones."""

    def __post_init__(self) -> None:
        check(
            self.max_experts is None or self.max_experts >= 2,
            "model.max_experts",
            self.max_experts,
            "an integer of at least 2, or null for all experts",
        )
        if self.size is not None:
            bytes_of_text(self.size)
        check(
            self.path is None or bool(self.path.strip()),
            "model.path",
            self.path,
            "a folder, a hub id or null",
        )


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for end, base in (("B", 1000), ("iB", 1024))
}


def bytes_of_text(text: str) -> int:
    """Return the bytes that a size such as 1.9GB or 2GiB says. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = (
        None if found is None else {name.lower(): size for name, size in _UNITS.items()}.get(found[2].lower())
    )
    if found is None or unit is None or float(found[1]) <= 0:
        raise ConfigError(
            f"model.size={text!r} is not possible: give bytes, such as 1.9GB, 800MB or 2GiB, or null"
        )
    return int(float(found[1]) * unit)


@dataclass
class NormaliseConfig:
    centre: Centre = Centre.scalar
    """Constant that is subtracted from the experts and stored exactly: none, one number, or the p x d mean expert."""
    scale: Scale = Scale.family
    """Deviation that is divided out and folded into the adapters: none, or one per family, expert or row."""
    metric: Metric = Metric.auto
    """Metric in which errors count. none: all alike. experts: columns by the second moment of the experts' rows, which
    lean to the directions that inputs have; needs no text. inputs: columns by the second moment of each expert's own
    inputs, rows and experts by what depends on them, from `calibrate.text`. Both cost RelFrob and gain perplexity. auto
    is inputs where there is a text, else none, or experts for method=gptq|gptq_rotated."""
    store: Store = Store.fit
    """How a fit holds the experts: normalised in its own dtype, or as the checkpoint stores them and normalised anew at
    every use. The second halves their memory for a bfloat16 checkpoint and changes no number."""


@dataclass
class BankConfig:
    m: int | str | None = None
    """Number of atoms: an integer or an expression in n, the number of experts that share the bank; null is n/4."""
    r: int | str | None = None
    """Rows of an atom: an integer or an expression in p or d, the rows and columns of an expert; null is p/2."""
    atom_rank: int | str | None = None
    """k of low-rank atoms B_j = U_j V_j, which keep k (r + d) numbers each: an integer or an expression in r, p or
    d; null is dense atoms."""
    kept: float | None = None
    """Share of the experts' own parameters to keep at most, 0 to 1: chooses m, r and the atom rank, those of a GloBE
    bank by short fits (see `budget`); null takes the sizes above."""
    size: float | None = None
    """Share of the experts' bytes in bfloat16 that the bank may take, 0 to 1, and never exceeds. Chooses the bits of
    adapters and atoms, and m and r by short fits that are rounded unless both are given; with method=gptq|gptq_rotated
    (and bank.bits=null) the bits of each row of the weights. Null takes what is given."""
    bits: float | None = None
    """Bits of the factors' numbers, which are then packed as integers with scales: the average over the entries of the
    adapters, 1 to 8, shared out over their rows and columns by what these matter, so that an expert that is used more
    has more. Atoms are few and have 3 bits more, 8 at most. With bits an atom may have up to d rows (`bank.r=d`). Null
    leaves the factors in `export_dtype`."""
    bits_A: float | None = None
    """Bits of the adapters, where they are to be others than `bank.bits` says."""
    bits_B: int | None = None
    """Bits of the atoms, 2 to 8, where they are to be others than `bank.bits` says."""
    group_A: int | None = None
    """Columns of the adapters that share a scale in every row, and then all rows have equal bits; null is one scale for
    a row and bits by row (64 columns and equal bits where weights are rounded)."""
    group_B: int = 64
    """Columns of the atoms that share a scale in every row."""
    coded: bool = False
    """Whether the adapters' integers are coded by how surprising they are, in the place of bits that are set apart for
    each. The error of a size falls, and the factors become numbers when they are loaded."""
    scope: Scope = Scope.family
    """Experts that share a bank: family joins those of one layer and family, families joins up and gate of a layer,
    layers joins all selected layers of a family."""
    activation: Activation = Activation.silu
    """Activation phi of the mixed bases; `schedule.lam` blends it in (0 is linear whatever stands here)."""

    def __post_init__(self) -> None:
        for key in ("m", "r", "atom_rank"):
            value = getattr(self, key)
            check(not isinstance(value, int) or value >= 1, f"bank.{key}", value, "an integer of at least 1")
        _check_bits(self)
        size = self.size
        check(size is None or 0 < size <= 1, "bank.size", size, "a share above 0 and at most 1, or null")
        if size is not None and (self.m is None) != (self.r is None):
            raise ConfigError(f"bank.size={size} takes bank.m and bank.r, and chooses their bits, or neither")
        for key in ("kept", "atom_rank", "bits", "bits_A", "bits_B"):
            value = getattr(self, key)
            if size is not None and value is not None:
                raise ConfigError(f"bank.size={size} chooses sizes and bits: leave out bank.{key}={value}")
        kept = self.kept
        check(kept is None or 0 < kept <= 1, "bank.kept", kept, "a share above 0 and at most 1, or null")
        given = [f"bank.{key}" for key in ("m", "r", "atom_rank") if getattr(self, key) is not None]
        if kept is not None and given:
            raise ConfigError(
                f"bank.kept={kept} sets the sizes of the method: leave out {' and '.join(given)}"
            )


def _check_bits(bank: BankConfig) -> None:
    for key in ("bits", "bits_A"):
        bits = getattr(bank, key)
        check(bits is None or 1 <= bits <= 8, f"bank.{key}", bits, "a number from 1 to 8, or null")
    bits = bank.bits_B
    check(bits is None or 2 <= bits <= 8, "bank.bits_B", bits, "an integer from 2 to 8, or null")
    alone = not bank.coded or bank.group_A is None
    check(alone, "bank.group_A", bank.group_A, "null with bank.coded=true, whose rows have one step")
    given = bank.bits is not None or bank.bits_A is not None
    check(bits is None or given, "bank.bits_B", bits, "bank.bits or bank.bits_A with it, or null")
    for key in ("group_A", "group_B"):
        group = getattr(bank, key)
        check(group is None or group >= 1, f"bank.{key}", group, "an integer of at least 1")


@dataclass
class BudgetConfig:
    """What `bank.kept` asks for: a search for sizes, once for each shape of bank, and how the share is spread."""

    seconds: float = 20.0
    """Seconds that all short fits may take on one core of the reference machine (see `globe.sizes.costs`). They become
    a number of steps beforehand, so that equal seeds choose equal sizes on any machine."""

    over: Over = Over.bank
    """Whose numbers `bank.kept`, or whose bytes `bank.size`, is a share of: those of each bank, or those of all banks
    of the run together. The second spreads them over layers and families by what each loses and, with `calibrate.text`,
    by what the model feels of it, before any fit; of numbers, a bank that is best left as it is gets none. Of bytes,
    `bank.m` and `bank.r` are to be given."""

    def __post_init__(self) -> None:
        check(positive(self.seconds), "budget.seconds", self.seconds, "a positive number")


@dataclass
class ServeConfig:
    """Limits that the sizes keep to: sizes that are chosen are cut to the rows that do, given ones are refused.

    Both are predicted from numbers resident and read (`globe.sizes.serving`) for all experts of a layer, and some form
    of serving, composed, bank or latent, keeps to both.
    """

    speed: float | None = None
    """Least speed of the experts in decoding, as a multiple of the dense ones', by the numbers that are read; null is
    none. The rows of an atom buy speed."""
    memory: float | None = None
    """Most bytes that a layer's experts take in memory, as a share of the dense ones'; null is none. The number of
    atoms and their rank buy bytes."""
    batch: list[int] = field(default_factory=lambda: [1, 8, 64])
    """Tokens of a decoding step at which `serve.speed` is kept, and that the dry run reports."""

    def __post_init__(self) -> None:
        check(
            self.speed is None or positive(self.speed),
            "serve.speed",
            self.speed,
            "a positive number, or null",
        )
        share = self.memory is None or 0 < self.memory <= 1
        check(share, "serve.memory", self.memory, "a share above 0 and at most 1, or null")
        good = bool(self.batch) and all(one >= 1 for one in self.batch)
        check(good, "serve.batch", self.batch, "one or more integers of at least 1")

    @property
    def limited(self) -> bool:
        return self.speed is not None or self.memory is not None
