"""What sizes cost to serve: numbers resident and numbers read in decoding, in every form, beside the dense experts.

Decoding is bound by what is read from memory. Of a family with experts of p x d, h of which are hit by the tokens of a
step, the dense form reads h p d numbers, the composed form h r (p + d), and the bank and the latent form the atoms once
(m r d, or m k (r + d) of low-rank ones) and h p r. So r buys speed and m buys bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rich.table import Table

from globe.am.records import Sizes
from globe.checkpoint import Checkpoint
from globe.checkpoint.model_config import experts_per_token
from globe.config.choices import FAMILIES_OF
from globe.config.console import add_row, new_table
from globe.config.schema import Config, is_linear
from globe.errors import ConfigError
from globe.fit.plan import BankSize, Outline

FAMILIES = 3
"""Families of a layer: gate, up and down."""


class Cost(NamedTuple):
    """What one form of a layer's experts costs, beside the dense ones."""

    bytes: float
    """held in memory, by one layer"""
    memory: float
    """the same as a share"""
    speed: Mapping[int, float]
    """multiples of the dense speed, by the tokens of a step"""

    @property
    def text(self) -> str:
        speeds = ", ".join(f"{speed:.2f} at batch {count}" for count, speed in self.speed.items())
        return f"{self.memory:.2f} of the bytes, speed {speeds}"


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of a layer that a bank serves, in a model that compresses all families of the run alike."""

    experts: int
    """of each family"""
    factored: int
    """those of them that the bank serves"""
    top_k: int
    """experts of a token"""
    families: int
    """families that the run compresses"""
    joined: int = 1
    """families of a layer that share the bank"""
    layers: int = 1
    """layers that share the bank"""
    itemsize: int = 2
    """bytes of a number"""

    def hit(self, tokens: int) -> float:
        """Return how many experts the tokens of a step are expected to use, if they choose without preference."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


def layer_of(config: Config, checkpoint: Checkpoint, bank: Outline) -> Layer:
    """Return the layer of a bank. A model that doesn't say how many experts a token has is taken to use two."""
    first = bank.members[0]
    experts = checkpoint.shape(*first).n
    return Layer(
        experts=experts,
        factored=min(experts, bank.counts[0]),
        top_k=min(experts, experts_per_token(checkpoint.config) or 2),
        families=len(FAMILIES_OF.get(config.family, (config.family,))),
        joined=len({member.family for member in bank.members}),
        layers=len({member.layer for member in bank.members}),
        itemsize=checkpoint.dtype(*first).itemsize,
    )


def costs(
    layer: Layer, p: int, d: int, size: BankSize, batches: tuple[int, ...], *, linear: bool
) -> dict[str, Cost]:
    """Return what each form costs: composed, and bank, or latent where phi is linear.

    Bases that are composed at the start are counted without the bank they are made of, which an engine need not keep.
    A bank with a curved phi has to be composed at every step, which takes time beside what is read.
    """
    m, r, k = size.m, size.r, size.atom_rank
    atoms = m * r * d if k is None else m * k * (r + d)
    banks = layer.families / layer.joined
    rest = layer.experts - layer.factored
    dense = FAMILIES * p * d

    def share(of_bank: float, of_expert: float, experts: float) -> float:
        """Return the numbers of all families as a share of the dense ones, for `experts` in the layer's proportion."""
        own, other = experts * layer.factored / layer.experts, experts * rest / layer.experts
        factored = banks * of_bank + layer.families * (own * of_expert + other * p * d)
        return (factored + (FAMILIES - layer.families) * experts * p * d) / (experts * dense)

    found = {}
    for form, of_bank, of_expert in (
        ("composed", 0, r * (p + d)),
        ("latent" if linear else "bank", atoms, r * p),
    ):
        codes = 0 if form == "composed" else m
        memory = share(of_bank / layer.layers, of_expert + codes, layer.experts)
        found[form] = Cost(
            bytes=memory * layer.experts * dense * layer.itemsize,
            memory=memory,
            speed={count: 1 / share(of_bank, of_expert, layer.hit(count)) for count in batches},
        )
    return found


def costs_of(config: Config, checkpoint: Checkpoint, bank: Outline, size: BankSize) -> dict[str, Cost]:
    """Return what each form of a bank of this size costs to serve; nothing for a model that is patched dense alone."""
    if checkpoint.dense_only:
        return {}
    layer, batches = layer_of(config, checkpoint, bank), tuple(config.serve.batch)
    return costs(layer, bank.p, bank.d, size, batches, linear=is_linear(config))


@dataclass(frozen=True, slots=True)
class Serving:
    """Limits that sizes have to keep to, for one shape of bank."""

    layer: Layer
    speed: float | None
    memory: float | None
    batches: tuple[int, ...]
    linear: bool

    def serves(self, p: int, d: int, size: BankSize) -> bool:
        """Return whether some form keeps to both limits, at every number of tokens."""
        forms = costs(self.layer, p, d, size, self.batches, linear=self.linear).values()
        return any(
            (self.memory is None or one.memory <= self.memory)
            and (self.speed is None or min(one.speed.values()) >= self.speed)
            for one in forms
        )

    def cut(self, p: int, d: int, size: BankSize) -> BankSize | None:
        """Return the size with as many rows as keep to the limits; None if not one row does.

        Fewer rows cost less in every form, so the most that serve are found by halving.
        """
        least, most = 0, size.r  # `least` rows serve, or are none
        if self.serves(p, d, size):
            return size
        while most - least > 1:
            middle = (least + most) // 2
            good = self.serves(p, d, replace(size, r=middle))
            least, most = (middle, most) if good else (least, middle)
        possible = least >= 1 and (size.atom_rank is None or least > size.atom_rank)
        return replace(size, r=least) if possible else None


def serving_of(config: Config, checkpoint: Checkpoint, bank: Outline) -> Serving | None:
    """Return the limits of `serve`; None where there are none."""
    if config.serve.speed is None and config.serve.memory is None:
        return None
    return Serving(
        layer_of(config, checkpoint, bank),
        config.serve.speed,
        config.serve.memory,
        tuple(config.serve.batch),
        is_linear(config),
    )


def unservable(serving: Serving, p: int, d: int, size: BankSize | None = None) -> ConfigError:
    """Return the sentence for limits that no size, or not the given one, keeps to."""
    limits = [
        f"serve.{name}={value:g}"
        for name, value in (("speed", serving.speed), ("memory", serving.memory))
        if value is not None
    ]
    given = BankSize(1, 1, None) if size is None else size
    forms = costs(serving.layer, p, d, given, serving.batches, linear=serving.linear)
    figures = "; ".join(
        f"{name} {min(one.speed.values()):.2f} times the speed and {one.memory:.2f} of the bytes"
        for name, one in forms.items()
    )
    what = "no sizes serve" if size is None else f"{given.text} does not serve"
    least = " at the very least sizes" if size is None else ""
    more = "" if serving.layer.families == FAMILIES else ", compress more families (family=all)"
    return ConfigError(
        f"{' and '.join(limits)}: {what} experts of {p} x {d} so, whose layer{least} has {figures}: give "
        f"weaker limits{more} or leave them out"
    )


def served(sizes: Iterable[BankSize], serving: Serving | None, p: int, d: int) -> tuple[BankSize, ...]:
    """Return the sizes, cut to the rows that keep to the limits, without those of which nothing is left."""
    if serving is None:
        return tuple(sizes)
    cut = (serving.cut(p, d, size) for size in sizes)
    return tuple(dict.fromkeys(size for size in cut if size is not None))


def require_served(serving: Serving | None, sizes: Sizes) -> None:
    """Raise ConfigError if sizes that were given do not keep to the limits."""
    if serving is not None and not serving.serves(sizes.p, sizes.d, size_of(sizes)):
        raise unservable(serving, sizes.p, sizes.d, size_of(sizes))


def size_of(sizes: Sizes) -> BankSize:
    return BankSize(sizes.m, sizes.r, sizes.atom_rank)


def serving_table(found: Mapping[Sizes, Mapping[str, Cost]], batches: Sequence[int]) -> Table:
    """Return what the experts of a layer cost to serve, once for each shape and size of bank."""
    headings = ("n x p x d", "m", "r", "k", "form", "a layer's\nexperts", "of dense")
    speeds = (f"speed,\nbatch {count}" for count in batches)
    table = new_table("serving, by numbers held and read: multiples of dense", (*headings, *speeds))
    for sizes, forms in found.items():
        for form, cost in forms.items():
            cells = (
                f"{sizes.n} x {sizes.p} x {sizes.d}",
                str(sizes.m),
                str(sizes.r),
                "-" if sizes.atom_rank is None else str(sizes.atom_rank),
                form,
                f"{cost.bytes / 2**20:,.1f} MiB",
                f"{cost.memory:.2f}",
                *(f"{cost.speed[count]:.2f}" for count in batches),
            )
            add_row(table, cells)
    return table
