"""Which experts modules are regular: each way not to be one is named in the refusal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from globe.calibration.experts_module import experts_modules
from globe.checkpoint import load_architecture
from globe.errors import ArtefactError, CheckpointError
from globe.hf.layout import BankLayout, Mean, MemberLayout
from globe.hf.structure import irregularity, require_regular
from globe.hf.swap import check_fit, swap_in
from tiny_models import TINY, tiny_config

N, P, D = 3, 5, 7


class MyExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(N, 2 * P, D))
        self.down_proj = nn.Parameter(torch.zeros(N, D, P))
        self.act_fn = nn.SiLU()
        self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = True, False, False, True


class Block(nn.Module):
    def __init__(self, experts: nn.Module | None) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = experts or nn.Linear(2, 2)


class Model(nn.Module):
    def __init__(self, *experts: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(one) for one in experts)


def changed(**attributes: object) -> MyExperts:
    module = MyExperts()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def layout(*members: MemberLayout, p: int = P, d: int = D) -> BankLayout:
    return BankLayout(2, 4, p, d, None, "silu", 0.0, Mean.none, members)


def test_a_regular_module_is_one() -> None:
    assert irregularity(MyExperts()) is None


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"is_transposed": True}, "transposed"),
        ({"has_bias": True}, "biases"),
        ({"is_concatenated": False}, "interleaves"),
        ({"has_gate": False}, "no gate"),
        ({"has_post_expert_norm": True}, "normalises"),
        ({"down_proj": nn.Parameter(torch.zeros(N, P, D))}, "shapes"),
        ({"gate_up_proj": None}, "no gate_up_proj"),
    ],
)
def test_every_irregularity_is_named_with_the_way_out(attributes: dict[str, object], reason: str) -> None:
    module = changed(**attributes)
    assert reason in (irregularity(module) or "")
    with pytest.raises(CheckpointError, match=rf"x\.y \(MyExperts\).*{reason}.*format=dense"):
        require_regular(module, "x.y")


def test_a_module_that_says_nothing_of_itself_is_irregular() -> None:
    module = MyExperts()
    del module.is_transposed  # as in architectures that transformers has not unified
    assert irregularity(module) is not None


def test_layers_are_read_off_module_names() -> None:
    assert experts_modules(Model(MyExperts(), None, MyExperts())) == {
        0: "layers.0.mlp.experts",
        2: "layers.2.mlp.experts",
    }
    twice = Model(MyExperts())
    twice.layers[0].other = nn.ModuleList([MyExperts()])
    with pytest.raises(CheckpointError, match=r"layers\.0\.other\.0.*format=dense"):
        experts_modules(twice)


@pytest.mark.parametrize(
    ("bank", "sentence"),
    [
        (layout(MemberLayout(1, "up", (0, 1))), r"experts in the layers \[0\]"),
        (layout(MemberLayout(0, "up", (0, 3))), "has 3 of 5 x 7"),
        (layout(MemberLayout(0, "up", (0,)), p=7, d=5), "7 x 5"),
        (layout(MemberLayout(0, "side", (0,))), "format=dense"),
        (layout(MemberLayout(0, "up", (0,)), MemberLayout(0, "up", (1,))), "twice"),
    ],
)
def test_a_bank_that_does_not_fit_changes_nothing(bank: BankLayout, sentence: str) -> None:
    model = Model(MyExperts(), None)
    with pytest.raises(ArtefactError, match=sentence):
        check_fit(model, experts_modules(model), [bank])
    with pytest.raises(ArtefactError, match=sentence):
        swap_in(model, [layout(MemberLayout(0, "gate", (0,))), bank])
    assert isinstance(model.layers[0].mlp.experts, MyExperts)
    assert SimpleNamespace(**model.layers[0].mlp.experts._parameters).gate_up_proj is not None


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_architectures_know_which_models_can_not_run_factored(model_type: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if model_type in ("llama4", "qwen3_5_moe") else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(tiny_config(model_type))
    modules = [model.get_submodule(name) for name in experts_modules(model).values()]
    assert modules
    irregular = any(irregularity(one) is not None for one in modules)
    assert irregular == (load_architecture(model_type).dense_only is not None)
