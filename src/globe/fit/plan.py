"""From a configuration and a checkpoint to plain integers: which layers, which banks, how large each one is.

Resolved once, after the checkpoint is open; nothing is written back into the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol, runtime_checkable

from globe.am.records import Sizes
from globe.am.seeding import JOINT
from globe.bank.precision import Precision
from globe.bank.rounding import MOST_BITS
from globe.baselines.budget import allowed_parameters
from globe.baselines.budget import resolve_sizes as baseline_sizes
from globe.baselines.records import BaselineSizes
from globe.config.choices import FAMILIES_OF, WEIGHT_METHODS, Centre, FirstCodes, Method, Scope
from globe.config.identity import DEFAULT_SIZES
from globe.config.layers import parse_layers, ranges
from globe.config.schema import Config
from globe.config.size_expressions import default_size, resolve_size
from globe.errors import ConfigError

_LONGEST_KEY = 100
"""Characters of a key's layers, which become a folder name."""


@runtime_checkable
class Shape(Protocol):
    """How many routed experts one layer and family has, and their size."""

    @property
    def n(self) -> int: ...
    @property
    def p(self) -> int: ...
    @property
    def d(self) -> int: ...


@runtime_checkable
class Source(Protocol):
    """What a plan needs to know of a checkpoint; `globe.checkpoint.Checkpoint` is one."""

    @property
    def num_layers(self) -> int: ...
    @property
    def moe_layers(self) -> tuple[int, ...]: ...
    def shape(self, layer: int, family: str, /) -> Shape: ...


class Matrices(NamedTuple):
    """The experts of one layer and family."""

    layer: int
    family: str


@dataclass(frozen=True, slots=True)
class BankSize:
    """What `bank.kept` or `bank.size` chooses."""

    m: int
    r: int
    atom_rank: int | None
    bits_A: float | None = None
    """average bits of the adapters, where the budget is one of bytes"""
    bits_B: int | None = None
    """bits of the atoms, likewise"""

    @property
    def text(self) -> str:
        """The sizes as a sentence has them."""
        rank = "" if self.atom_rank is None else f", k={self.atom_rank} (rank of an atom)"
        bits = (
            "" if self.bits_A is None else f", {self.bits_A:.2f} and {self.bits_B} bits of adapters and atoms"
        )
        return f"m={self.m}, r={self.r}{rank}{bits}"


@dataclass(frozen=True, slots=True)
class Outline:
    """Whose experts share a bank, before its sizes are known."""

    members: tuple[Matrices, ...]
    counts: tuple[int, ...]
    """experts of each member"""
    p: int
    d: int

    @property
    def n(self) -> int:
        return sum(self.counts)

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each member, and n at the end."""
        return tuple(accumulate(self.counts, initial=0))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, p, d); banks of one shape get one choice of sizes."""
        return self.n, self.p, self.d

    @property
    def key(self) -> str:
        """Name in folders, logs and tables: `layer012.up`, `layer012.up+gate`, `layers004-008.up`."""
        layers = sorted({member.layer for member in self.members})
        families = "+".join(dict.fromkeys(member.family for member in self.members))
        if len(layers) == 1:
            return f"layer{layers[0]:03d}.{families}"
        name = ranges(layers, join="+", digits=3)
        if len(name) > _LONGEST_KEY:
            name = f"{layers[0]:03d}-{layers[-1]:03d}x{len(layers)}"
        return f"layers{name}.{families}"


@dataclass(frozen=True, slots=True)
class BankPlan:
    """One bank to learn: whose experts share it, its sizes, and what they keep."""

    outline: Outline
    sizes: Sizes
    baseline: BaselineSizes | None
    """the same sizes, counted as the method counts; None is method=globe"""
    mean_parameters: int
    """numbers of the stored means"""
    precision: Precision | None = None
    """bits of the factors; None leaves them in the export dtype"""

    @property
    def key(self) -> str:
        return self.outline.key

    @property
    def members(self) -> tuple[Matrices, ...]:
        return self.outline.members

    @property
    def parameters(self) -> int:
        """Of the dense experts."""
        return self.sizes.n * self.sizes.p * self.sizes.d

    @property
    def kept_parameters(self) -> int:
        """Adapters, atoms, codes and stored means: the artefact's own count, or the method's tightest form."""
        return (self.baseline or self.sizes).parameters + self.mean_parameters

    @property
    def kept(self) -> float:
        return self.kept_parameters / self.parameters


def cache_bytes(bank: BankPlan, S_cache: int | str, itemsize: int) -> int:
    """Return the bytes of the mixed bases (r x d) that stay composed once all caches are full, `itemsize` a number."""
    held = sum(count if S_cache == "all" else min(int(S_cache), count) for count in bank.outline.counts)
    return held * bank.sizes.r * bank.sizes.d * itemsize


def outline(config: Config, checkpoint: Source) -> tuple[Outline, ...]:
    """Return the banks of a run in the order they are learned: layer by layer, up before gate before down.

    `bank.scope` says whose experts share one: those of a layer and family (`family`), the families of a layer
    (`families`), or one family's in all selected layers (`layers`). A member has min(experts, model.max_experts)
    routed experts, and the shared expert if `model.include_shared` asks for it. Raises ConfigError when a layer
    does not exist, or when members of a bank differ in p or d.
    """
    families = [str(one) for one in FAMILIES_OF.get(config.family, (config.family,))]
    layers = parse_layers(config.layer, checkpoint.moe_layers, checkpoint.num_layers)
    match config.bank.scope:
        case Scope.family:
            groups = [[Matrices(layer, family)] for layer in layers for family in families]
        case Scope.families:
            groups = [[Matrices(layer, family) for family in families] for layer in layers]
        case Scope.layers:
            groups = [[Matrices(layer, family) for layer in layers] for family in families]
    return tuple(_outline_of(config, checkpoint, tuple(members)) for members in groups)


def _outline_of(config: Config, checkpoint: Source, members: tuple[Matrices, ...]) -> Outline:
    shapes = [checkpoint.shape(*member) for member in members]
    p, d = shapes[0].p, shapes[0].d
    for member, shape in zip(members, shapes, strict=True):
        if (shape.p, shape.d) != (p, d):
            raise ConfigError(
                f"bank.scope={config.bank.scope} joins matrices of one size, and layer {member.layer} {member.family} "
                f"has {shape.p} x {shape.d} where layer {members[0].layer} {members[0].family} has {p} x {d}: select "
                "layers of one size, or give bank.scope=family"
            )
    most = config.model.max_experts
    counts = (shape.n if most is None else min(shape.n, most) for shape in shapes)
    return Outline(members, tuple(count + config.model.include_shared for count in counts), p, d)


def plan(
    config: Config, checkpoint: Source, chosen: Mapping[tuple[int, int, int], BankSize] | None = None
) -> tuple[BankPlan, ...]:
    """Return the banks of a run with their sizes. Raises ConfigError when a layer does not exist or a size can't be.

    With `bank.kept` and method=globe the sizes are `chosen` by search, for each shape (n, p, d) of a bank.
    """
    return tuple(plan_bank(config, one, (chosen or {}).get(one.shape)) for one in outline(config, checkpoint))


def plan_bank(config: Config, bank: Outline, chosen: BankSize | None = None) -> BankPlan:
    """Return one bank with the sizes it is given, or that its method makes of the budget."""
    means = mean_parameters(config, bank)
    if config.method is Method.globe:
        return BankPlan(bank, resolve_sizes(config, bank, chosen), None, means, precision_of(config, chosen))
    own = _baseline_sizes(config, bank)
    sizes = Sizes(*bank.shape, m=own.m, r=own.r, atom_rank=own.atom_rank)
    return BankPlan(bank, sizes, own, means, precision_of(config) or _bits_by_row(config, bank))


def _bits_by_row(config: Config, bank: Outline) -> Precision | None:
    """Return the bits of weights that are rounded within `bank.size`, shared out over their rows."""
    if config.bank.size is None or config.method not in WEIGHT_METHODS:
        return None
    n, p, d = bank.shape
    average = config.bank.size * 16 - (32 * mean_parameters(config, bank) + 16 * d) / (n * p * d) - 24 / d
    if average < 1:
        raise ConfigError(
            f"bank.size={config.bank.size} leaves less than a bit for each weight: give a larger share"
        )
    return Precision(min(8.0, average), MOST_BITS)


def mean_parameters(config: Config, bank: Outline) -> int:
    """Return how many numbers are those of the stored means: none, one per member, or a p x d matrix per member."""
    if config.method is Method.mean_svd:  # its own mean expert takes the other in, counted with its sizes
        return 0
    match config.normalise.centre:
        case Centre.none:
            return 0
        case Centre.scalar:
            return len(bank.members)
        case Centre.expert_mean:
            return len(bank.members) * bank.p * bank.d


def allowed(config: Config, bank: Outline) -> int:
    """Return how many numbers `bank.kept` leaves for factors: a share of n p d, less the stored means."""
    assert config.bank.kept is not None
    return allowed_parameters(config.bank.kept, n=bank.n, p=bank.p, d=bank.d) - mean_parameters(config, bank)


def resolve_sizes(config: Config, bank: Outline, chosen: BankSize | None = None) -> Sizes:
    """Return the sizes of a GloBE bank, as configured or `chosen`. Raises ConfigError naming what can't be."""
    n, p, d = bank.shape
    if chosen is None:
        assert config.bank.kept is None, "sizes within a budget are chosen by search"
        m, r = config.bank.m, config.bank.r
        if m is None:
            m = default_size(DEFAULT_SIZES["m"], {"n": n}, n)
        m = resolve_size("bank.m", m, {"n": n}, n, f"the {n} experts that share the bank")
        rank = f"min(p, d)={min(p, d)}, the rank of a {p} x {d} expert"
        if r is None:
            r = default_size(DEFAULT_SIZES["r"], {"p": p, "d": d}, min(p, d))
        most = min(p, d)
        few_bits = precision_of(config) is not None or config.bank.size is not None
        if few_bits and can_be_wide(config):
            most, rank = d, f"d={d}, the columns of an expert"
        r = resolve_size("bank.r", r, {"p": p, "d": d}, most, rank)
        k = config.bank.atom_rank
        if k is not None:
            rank = f"min(r, d)={min(r, d)}, the rank of an {r} x {d} atom"
            k = resolve_size("bank.atom_rank", k, {"r": r, "p": p, "d": d}, min(r, d), rank)
        chosen = BankSize(m, r, k)
    support = None if is_met_by_every_atom(config, chosen.m) else target_support(config, chosen.m)
    return Sizes(n, p, d, chosen.m, chosen.r, target_support=support, atom_rank=chosen.atom_rank)


def is_met_by_every_atom(config: Config, m: int) -> bool:
    """Return whether the support typed is a number above m, so that codes that use all m atoms are within it."""
    support = config.codes.target_support
    return isinstance(support, int) and support > m


def can_be_wide(config: Config) -> bool:
    """Return whether a mixed basis may have more rows than an expert, which bits are better spent on than numbers.

    A basis of d rows takes no rank from anybody: bits by row and column then decide alone what each expert keeps.
    """
    joint = config.init.seeding in JOINT and config.init.codes is FirstCodes.mixed
    beta = config.schedule.beta
    return joint and min(beta.start, beta.end) >= 1


def is_search(config: Config) -> bool:
    """Return whether the sizes are to be chosen by short fits."""
    budget = config.bank.kept is not None or config.bank.size is not None
    return config.method is Method.globe and budget


def precision_of(config: Config, chosen: BankSize | None = None) -> Precision | None:
    """Return the bits that the configuration, or a search, gives to factors; None leaves them in the export dtype."""
    bank = config.bank
    if chosen is not None and chosen.bits_A is not None and chosen.bits_B is not None:
        return Precision(chosen.bits_A, chosen.bits_B, bank.group_A, bank.group_B, bank.coded)
    adapters = bank.bits if bank.bits_A is None else bank.bits_A
    if adapters is None:
        return None
    atoms = bank.bits_B
    if atoms is None:
        atoms = min(8, math.ceil(adapters if bank.bits is None else bank.bits) + 3)
    return Precision(float(adapters), atoms, bank.group_A, bank.group_B, bank.coded)


def target_support(config: Config, m: int) -> int | None:
    """Return `codes.target_support` for m atoms. Raises ConfigError when it does not come out."""
    support = config.codes.target_support
    if support is None:
        return None
    return resolve_size("codes.target_support", support, {"m": m}, m, f"the {m} atoms of the bank")


def _baseline_sizes(config: Config, bank: Outline) -> BaselineSizes:
    """Return the largest sizes of a baseline that keep no more than the GloBE bank of the same options, or than
    `kept`.

    Where a method has them, m and r are the given ones: group_svd and MoBE take both, SLBF takes r (and atom_rank,
    which then is no longer filled up).
    """
    n, p, d = bank.shape
    method, name = config.method, str(config.method)
    if method in WEIGHT_METHODS:
        return BaselineSizes(method, n, p, d, m=1, r=d)
    if config.bank.kept is not None:
        budget = allowed(config, bank)
        if budget < 1:
            raise ConfigError(
                f"bank.kept={config.bank.kept} leaves no parameter for method={name}: give a larger share"
            )
        return baseline_sizes(name, n=n, p=p, d=d, budget=budget)
    same = resolve_sizes(config, bank)
    match method:
        case Method.group_svd | Method.mobe | Method.mobe_corrected:
            return baseline_sizes(name, n=n, p=p, d=d, m=same.m, r=same.r)
        case Method.slbf if same.atom_rank is not None:
            return baseline_sizes(name, n=n, p=p, d=d, r=same.r, atom_rank=same.atom_rank)
        case Method.slbf:
            return baseline_sizes(name, n=n, p=p, d=d, r=same.r, budget=same.parameters)
        case _:
            return baseline_sizes(name, n=n, p=p, d=d, budget=same.parameters)
