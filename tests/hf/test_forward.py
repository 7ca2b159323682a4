"""The factored experts module alone, against a slow reference: routing, gradients, dtypes and the cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import globe.hf.products as products_module
import globe.hf.projection as projection_module
from globe.hf.atoms import Atoms
from globe.hf.experts import GlobeExperts
from globe.hf.layout import BankLayout, Mean, MemberLayout
from globe.numerics.activation import phi

P, D, R, M, K = 5, 7, 4, 3, 2
"""Experts: n, which every test chooses, is another number still."""


class PlainExperts(nn.Module):
    """A regular experts module as transformers makes them, multiplied out the obvious way."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * P, D))
        self.down_proj = nn.Parameter(torch.empty(n, D, P))
        self.act_fn = nn.SiLU()
        self.num_experts = n

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for slot in range(index.shape[1]):
                expert = int(index[token, slot])
                if expert < self.num_experts:
                    gate, up = F.linear(x[token], self.gate_up_proj[expert]).chunk(2)
                    y = F.linear(self._apply_gate(torch.cat([gate, up])), self.down_proj[expert])
                    out[token] = out[token] + weight[token, slot] * y
        return out

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class ClampedExperts(PlainExperts):
    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=0.4)) * up.clamp(-0.4, 0.4)


def layout(experts: Sequence[int], **changes: Any) -> BankLayout:
    members = (MemberLayout(0, "up", tuple(experts)),)
    given = {"atom_rank": None, "activation": "silu", "lam": 0.6, "mean": Mean.none, "members": members}
    return BankLayout(m=M, r=R, p=P, d=D, **(given | changes))


def factored(
    n: int, *, kind: type[PlainExperts] = PlainExperts, seed: int = 0, **served: Any
) -> GlobeExperts:
    """Random factored experts; `served` gives the layouts of some of "gate", "up" and "down"."""
    places = {family: (one, one.members[0], None) for family, one in served.items()}
    module = GlobeExperts(kind(n), places)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.5, generator=generator)
            if name.endswith("codes"):
                parameter.abs_()
                parameter[parameter < 0.2] = 0
    return module


def dense_twin(module: GlobeExperts) -> PlainExperts:
    """The same experts multiplied out, with gradients to the factors."""
    weights = {}
    for family in module.families:
        one = module.projections[family]
        rows = []
        for expert in range(module.num_experts):
            if expert in one.dense_row:
                rows.append(one.dense[one.dense_row[expert]])
                continue
            held, row = one.bank(), one.row[expert]
            bank = held.atoms if held.atoms is not None else held.left @ held.right
            Y = sum(one.codes[row, j] * bank[j] for j in range(M))
            W = one.adapters[row] @ phi(Y, lam=one.layout.lam, activation=one.layout.activation)
            rows.append(W if one.layout.mean is Mean.none else W + one.mean)
        weights[family] = torch.stack(rows)
    down = weights["down"].mT if "down" in weights else module.down_proj
    twin = copy.deepcopy(module._dense[0])
    twin.gate_up_proj, twin.down_proj = None, None
    del twin._parameters["gate_up_proj"], twin._parameters["down_proj"]
    twin.gate_up_proj, twin.down_proj = torch.cat([weights["gate"], weights["up"]], dim=1), down
    return twin


def call(n: int, tokens: int, *, seed: int = 1, highest: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the experts of every token (all different), and their weights."""
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(highest or n, generator=generator)[:K] for _ in range(tokens)]
    index = torch.stack(picks) if picks else torch.zeros(0, K, dtype=torch.int64)
    return torch.randn(tokens, D, generator=generator), index, torch.rand(tokens, K, generator=generator)


VARIANTS = {
    "both": {"gate": layout(range(6)), "up": layout(range(6))},
    "up alone": {"up": layout(range(6))},
    "gate of some experts": {"gate": layout([4, 0, 3])},
    "linear": {"gate": layout(range(6), lam=0.0), "up": layout(range(6), activation="identity", lam=1.0)},
    "low rank": {"up": layout(range(6), atom_rank=2), "gate": layout([5, 2], atom_rank=2, lam=0.0)},
    "scalar mean": {
        "up": layout(range(6), mean=Mean.scalar),
        "gate": layout([1, 2], mean=Mean.scalar, lam=0.0),
    },
    "matrix mean": {"up": layout(range(5), mean=Mean.matrix, activation="tanh"), "gate": layout([3])},
    "all three": {
        "gate": layout(range(6)),
        "up": layout([1, 4]),
        "down": layout(range(6), activation="tanh"),
    },
    "down alone": {"down": layout([4, 0, 3], lam=1.0)},
    "down low rank": {"down": layout(range(6), atom_rank=2, mean=Mean.scalar)},
    "down linear": {"down": layout([5, 2], lam=0.0, mean=Mean.matrix), "up": layout(range(6))},
}


@pytest.mark.parametrize("capacity", [0, 2, 6])
@pytest.mark.parametrize("tokens", [1, 4, 23])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_forward_equals_the_dense_product(variant: str, tokens: int, capacity: int) -> None:
    module = factored(6, **VARIANTS[variant])
    for one in module.projections.values():
        one.cache.capacity = min(capacity, len(one.row))
    inputs = call(6, tokens)
    expected = dense_twin(module)(*inputs)
    for _ in range(2):  # with an empty cache, and with a full one
        torch.testing.assert_close(module(*inputs), expected, atol=1e-6, rtol=1e-5)


@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 9), st.integers(0, 50), st.booleans())
def test_forward_equals_the_dense_product_for_any_routing(
    n: int, tokens: int, capacity: int, seed: int, linear: bool
) -> None:
    chosen = [expert for expert in range(n) if (seed >> expert % 5) & 1]
    bank = layout(chosen, lam=0.0 if linear else 0.6)
    module = factored(n, seed=seed, up=bank) if chosen else factored(n, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    # any index at all, twice the same for one token too, and n, which stands for an expert elsewhere
    index = torch.randint(0, n + 1, (tokens, K), generator=generator)
    x, weight = torch.randn(tokens, D, generator=generator), torch.rand(tokens, K, generator=generator)
    module.globe_up.cache.capacity = min(capacity, len(chosen))
    with torch.no_grad():
        torch.testing.assert_close(
            module(x, index, weight), dense_twin(module)(x, index, weight), atol=1e-6, rtol=1e-5
        )


def test_custom_gating_of_the_dense_module_is_kept() -> None:
    module = factored(6, kind=ClampedExperts, **VARIANTS["both"])
    inputs = call(6, 9)
    with torch.no_grad():
        out = module(*inputs)
        torch.testing.assert_close(out, dense_twin(module)(*inputs), atol=1e-6, rtol=1e-5)
        module._plain = True
        assert (module(*inputs) - out).abs().max() > 1e-2


@pytest.mark.parametrize("capacity", [0, 6])
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_the_dense_product(variant: str, tokens: int, capacity: int) -> None:
    module = factored(6, **VARIANTS[variant]).double()
    for one in module.projections.values():
        one.cache.capacity = min(capacity, len(one.row))
    x, index, weight = (one.double() if one.is_floating_point() else one for one in call(6, tokens))
    with torch.no_grad():
        module(x, index, weight)  # fills the cache, which must not be used below
    leaves = [x.requires_grad_(), weight.requires_grad_(), *module.parameters()]
    probe = torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad((module(x, index, weight) * probe).sum(), leaves, allow_unused=True)
    twin = dense_twin(module)
    expected = torch.autograd.grad((twin(x, index, weight) * probe).sum(), leaves, allow_unused=True)
    for one, other, leaf in zip(found, expected, leaves, strict=True):
        zero = torch.zeros_like(leaf)
        # the bases are mixed and rounded in the dtype of the factors: float64 here, so exactly
        torch.testing.assert_close(zero if one is None else one, zero if other is None else other)
    assert all(one is not None and bool(one.abs().max() > 0) for one in found[:2])


def test_frozen_factors_are_cached_and_pass_gradients_to_the_input() -> None:
    module = factored(6, **VARIANTS["both"]).requires_grad_(False)
    x, index, weight = call(6, 8)
    x.requires_grad_()
    (found,) = torch.autograd.grad(module(x, index, weight).square().sum(), x)
    assert module.globe_up.composed_bytes > 0
    (expected,) = torch.autograd.grad(dense_twin(module)(x, index, weight).square().sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def composed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bases each composition makes, from now on."""
    sizes: list[int] = []
    original = projection_module.mixed_bases

    def counting(codes: Tensor, *args: Any, **options: Any) -> Tensor:
        sizes.append(codes.shape[0])
        return original(codes, *args, **options)

    def counting_phi(Y: Tensor, **options: Any) -> Tensor:
        sizes.append(Y.shape[0])
        return phi(Y, **options)

    monkeypatch.setattr(projection_module, "mixed_bases", counting)
    monkeypatch.setattr(products_module, "phi", counting_phi)
    return sizes


@torch.no_grad()
def test_only_experts_that_got_a_token_are_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = factored(11, up=layout(range(11)))
    module.globe_up.cache.capacity = 0
    sizes = composed(monkeypatch)
    x, _, weight = call(11, 30)
    module(x, torch.tensor([[2, 9]]).expand(30, K), weight)
    assert sizes == [2]
    sizes.clear()
    _, index, _ = call(11, 30)
    assert index.unique().numel() == 11
    module(x, index, weight)
    assert sizes == [11]
    assert module.globe_up.composed_bytes == 0


@torch.no_grad()
def test_the_cache_keeps_the_most_recently_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = factored(11, up=layout(range(11)))
    module.globe_up.cache.capacity = 3
    x, weight = torch.randn(1, D), torch.ones(1, K)
    sizes = composed(monkeypatch)
    for pair, new in (
        ([0, 1], [1, 1]),
        ([1, 2], [1]),
        ([0, 2], []),
        ([5, 0], [1]),
        ([1, 0], [1]),
        ([2, 5], [1]),
    ):
        sizes.clear()
        module(x, torch.tensor([pair]), weight)
        assert sizes == new, pair
        # after [5, 0] the least recently used of 0, 1, 2 and 5 is 1: it goes, and has to be made again
        assert module.globe_up.composed_bytes <= 3 * R * D * 4
    assert module.globe_up.composed_bytes == 3 * R * D * 4


@torch.no_grad()
def test_a_cache_smaller_than_a_call_still_serves_part_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Throwing out the least recently used within a call would leave nothing to find: six in, in a circle."""
    module = factored(6, up=layout(range(6)))
    module.globe_up.cache.capacity = 4
    inputs = call(6, 30)
    module(*inputs)
    sizes = composed(monkeypatch)
    for _ in range(3):
        module(*inputs)
    assert sizes == [2, 2, 2]


@torch.no_grad()
def test_a_full_cache_composes_every_expert_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = factored(11, up=layout(range(11)), gate=layout(range(11)))
    sizes = composed(monkeypatch)
    for seed in range(6):
        module(*call(11, 30, seed=seed))
    assert sum(sizes) == 2 * 11
    assert module.globe_up.composed_bytes == 11 * R * D * 4


@pytest.mark.parametrize("change", ["step", "state", "dtype"])
def test_the_cache_forgets_what_changed_factors_made(change: str) -> None:
    module = factored(6, **VARIANTS["both"])
    inputs = call(6, 9)
    with torch.no_grad():
        before = module(*inputs)
    match change:
        case "step":
            optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
            module(*inputs).square().sum().backward()
            optimiser.step()
        case "state":
            module.load_state_dict(factored(6, seed=4, **VARIANTS["both"]).state_dict())
        case "dtype":
            module = module.double()
            inputs = (inputs[0].double(), inputs[1], inputs[2].double())
    with torch.no_grad():
        after = module(*inputs)
        torch.testing.assert_close(after, dense_twin(module)(*inputs), atol=1e-6, rtol=1e-5)
    if change != "dtype":
        assert (after - before).abs().max() > 1e-3


def test_inference_mode_and_autocast_leave_an_ordinary_cache() -> None:
    module = factored(6, **VARIANTS["both"]).requires_grad_(False)
    inputs = call(6, 9)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(*inputs)
    x = inputs[0].clone().requires_grad_()
    exact = module(x, *inputs[1:])
    exact.sum().backward()
    torch.testing.assert_close(exact, dense_twin(module)(*inputs), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rough.float(), exact.detach(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capacity", [0, 6])
@torch.no_grad()
def test_half_precision_is_as_good_as_its_rounding(dtype: torch.dtype, capacity: int) -> None:
    exact = factored(6, **VARIANTS["linear"])
    module = copy.deepcopy(exact).to(dtype)
    exact = copy.deepcopy(module).float()  # the same rounded factors
    for one in module.projections.values():
        one.cache.capacity = capacity
    x, index, weight = call(6, 5)
    out = module(x.to(dtype), index, weight.to(dtype))
    assert out.dtype == dtype
    expected = exact(x.to(dtype).float(), index, weight.to(dtype).float())
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps


@torch.no_grad()
def test_without_tokens_nothing_is_done() -> None:
    module = factored(6, **VARIANTS["both"])
    out = module(*call(6, 0))
    assert out.shape == (0, D)
    x, _, weight = call(6, 4)
    assert not module(x, torch.full((4, K), 6), weight).any()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_densify_gives_the_dense_module_back(variant: str) -> None:
    module = factored(6, **VARIANTS[variant])
    inputs = call(6, 9)
    expected, twin = module(*inputs), dense_twin(module)
    dense = module.densify()
    assert type(dense) is PlainExperts
    torch.testing.assert_close(dense.gate_up_proj.data, twin.gate_up_proj)
    torch.testing.assert_close(dense(*inputs), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_shared_bank_is_in_no_layer_and_moves_to_the_layers_device() -> None:
    bank = layout(range(6))
    atoms = Atoms(bank, torch.float32)
    nn.init.normal_(atoms.atoms)
    module = GlobeExperts(PlainExperts(6), {"up": (bank, bank.members[0], atoms)})
    assert not any("bank" in name for name, _ in module.named_parameters())
    assert module.globe_up.bank_here().atoms is atoms.atoms


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_prepacked_bases_give_what_plain_ones_give(changes: dict[str, Any]) -> None:
    module = factored(6, **changes).requires_grad_(False).bfloat16()
    twin = copy.deepcopy(module).float()
    for tokens in (1, 2, 9):  # fewer rows than the smallest product, and enough
        x, index, weight = call(6, tokens)
        x, weight = x.bfloat16(), weight.bfloat16()
        plain = module(x.clone().requires_grad_(), index, weight)
        with torch.no_grad():
            found = module(x, index, weight)
            exact = twin(x.float(), index, weight.float())
        torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0.03)
        torch.testing.assert_close(found, plain.detach(), atol=0.03, rtol=0.03)


@torch.no_grad()
def test_prepacked_bases_are_counted_forgotten_and_not_copied() -> None:
    module = factored(6, up=layout(range(6))).requires_grad_(False).bfloat16()
    inputs = call(6, 9)
    x, index, weight = inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16()
    expected = module(x, index, weight)
    assert module.globe_up.composed_bytes == 6 * R * D * 2
    assert copy.deepcopy(module.globe_up).composed_bytes == 0
    torch.testing.assert_close(copy.deepcopy(module)(x, index, weight), expected)
    module.globe_up.codes.mul_(3)
    found = module(x, index, weight)
    torch.testing.assert_close(found.float(), copy.deepcopy(module).float()(*inputs), atol=0.05, rtol=0.05)
    assert (found - expected).abs().max() > 0.05


def test_autocast_of_a_wider_module_takes_narrow_tokens() -> None:
    module = factored(6, up=layout(range(6))).requires_grad_(False)
    inputs = call(6, 9)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(inputs[0].bfloat16(), *inputs[1:])
        torch.testing.assert_close(rough.float(), module(*inputs).float(), atol=0.05, rtol=0.05)
