"""Banks of several members: who shares one, what it costs, and that it is read, fitted, exported and patched whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import globe.fit.one_bank
from globe.bank.compose import rebuild
from globe.bank.file import read_artefact
from globe.checkpoint import open_checkpoint
from globe.config.choices import Centre, Family, Scope
from globe.config.schema import BankConfig, Config, ModelConfig, NormaliseConfig
from globe.errors import ConfigError
from globe.fit.plan import Matrices, Outline, outline, plan
from outlined_model import Model
from run_support import EMBEDDED, FakeFit, bytes_of, load, run_in

FEW = ("train.steps=3", "model.max_experts=6", "bank.m=5", "bank.r=11")


def config_of(scope: str, layer: object, family: str = "both", **bank: object) -> Config:
    return Config(family=Family(family), layer=layer, bank=BankConfig(scope=Scope(scope), **bank))  # type: ignore[arg-type]


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "layer", "keys", "n"),
    [
        ("family", "4-5", ["layer004.up", "layer004.gate", "layer005.up", "layer005.gate"], 16),
        ("families", "4-5", ["layer004.up+gate", "layer005.up+gate"], 32),
        ("layers", "4-6", ["layers004-006.up", "layers004-006.gate"], 48),
        ("layers", [2, 4, 5], ["layers002+004-005.up", "layers002+004-005.gate"], 48),
        ("layers", 12, ["layer012.up", "layer012.gate"], 16),
    ],
)
def test_who_shares_a_bank(scope: str, layer: object, keys: list[str], n: int) -> None:
    banks = plan(config_of(scope, layer), Model())
    assert [bank.key for bank in banks] == keys
    assert {bank.sizes.n for bank in banks} == {n}
    assert {bank.sizes.m for bank in banks} == {n // 4}  # n of an expression is all that share the bank
    members = [member for bank in banks for member in bank.members]
    assert len(set(members)) == len(members)


@pytest.mark.parametrize(
    ("scope", "family", "keys"),
    [
        ("family", "down", ["layer004.down"]),
        ("family", "all", ["layer004.up", "layer004.gate", "layer004.down"]),
        ("families", "all", ["layer004.up+gate+down"]),
    ],
)
def test_down_is_a_family_of_its_own_and_part_of_all(scope: str, family: str, keys: list[str]) -> None:
    assert [bank.key for bank in plan(config_of(scope, 4, family), Model())] == keys


def test_members_may_differ_in_experts_and_not_in_size() -> None:
    (up, _) = outline(config_of("layers", "6-8"), Model())
    assert (up.counts, up.n) == ((16, 12, 16), 44)
    with pytest.raises(
        ConfigError, match=r"^bank\.scope=layers joins .* layer 9 up has 44 x 72 where layer 8 up"
    ):
        outline(config_of("layers", "8-9"), Model())
    assert len(outline(config_of("families", "8-9"), Model())) == 2


def test_the_budget_counts_the_bank_once_and_a_mean_for_each_member() -> None:
    n, p, d, m, r = 48, 44, 60, 7, 13
    for centre, mean in ((Centre.none, 0), (Centre.scalar, 3), (Centre.expert_mean, 3 * p * d)):
        config = Config(
            layer="4-6",
            bank=BankConfig(m=m, r=r, scope=Scope.layers),
            normalise=NormaliseConfig(centre=centre),
        )
        (bank,) = plan(config, Model())
        assert bank.kept_parameters == n * p * r + m * r * d + n * m + mean
        assert bank.kept == pytest.approx(bank.kept_parameters / (n * p * d))


def test_the_shared_expert_is_counted_in_every_member() -> None:
    config = config_of("families", 3, m="n")
    config.model = ModelConfig(include_shared=True, max_experts=5)
    assert plan(config, Model())[0].sizes.m == 12


def test_a_key_is_one_folder_name_however_many_layers_it_has() -> None:
    def key(layers: range) -> str:
        members = tuple(Matrices(layer, "up") for layer in layers)
        return Outline(members, (16,) * len(members), 44, 60).key

    assert key(range(1, 128, 2)) == "layers001-127x64.up"
    assert key(range(3, 61)) == "layers003-060.up"
    assert key(range(0, 20, 2)) == "layers000+002+004+006+008+010+012+014+016+018.up"


# --- runs -----------------------------------------------------------------------------------------------------------


def weights_of(layer: int, family: str, count: int = 6) -> torch.Tensor:
    return open_checkpoint(None).read_experts(layer, family, max_experts=count).weights.double()


@pytest.mark.parametrize(
    "normalise", ["normalise.scale=family", "normalise.scale=row normalise.centre=expert_mean"]
)
def test_a_real_run_of_joined_families_leaves_true_figures(tmp_path: Path, normalise: str) -> None:
    options = ("layer=[4,9]", "family=both", "bank.scope=families", "export_dtype=float32", *FEW)
    _, folder = run_in(tmp_path, *options, *normalise.split(" "))
    report = next(
        bank for bank in load(folder / "summary.json")["banks"] if bank["key"] == "layer009.up+gate"
    )
    artefact = read_artefact(folder / "banks" / "layer009.up+gate")
    assert [(one.layer, one.family, one.start, one.stop) for one in artefact.members] == [
        (9, "up", 0, 6),
        (9, "gate", 6, 12),
    ]
    means = 2 if "family" in normalise else 2 * EMBEDDED.p * EMBEDDED.d
    assert (
        report["kept_parameters"]
        == 12 * EMBEDDED.p * 11 + 5 * 11 * EMBEDDED.d + 12 * 5 + means
        == artefact.kept_parameters
    )
    # each member's error, in its own units, from nothing but the checkpoint and the artefact
    rebuilt = rebuild(artefact).double()
    for family, rows in (("up", slice(0, 6)), ("gate", slice(6, 12))):
        W = weights_of(9, family)
        if "family" in normalise:
            left, right = W - rebuilt[rows], W - W.mean()
        else:
            centred = W - W.mean(dim=0)
            scale = centred.square().mean(dim=2, keepdim=True).sqrt()
            left, right = (W - rebuilt[rows]) / scale, centred / scale
        assert report["metrics"][f"relfrob_layer009_{family}"] == pytest.approx(
            float(left.norm() / right.norm()), rel=1e-4
        )


def test_a_bank_of_layers_joins_members_that_are_normalised_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    inner = FakeFit()

    def watching(experts: torch.Tensor, *args: object, **kwargs: object) -> object:
        seen.append(experts)
        return inner(experts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", watching)
    _, folder = run_in(tmp_path, "layer=2-4", "bank.scope=layers", *FEW)
    (X,) = seen
    assert X.shape == (18, EMBEDDED.p, EMBEDDED.d)
    for index, layer in enumerate((2, 3, 4)):
        part = X[6 * index : 6 * index + 6].double()
        W = weights_of(layer, "up")
        assert torch.allclose(part, (W - W.mean()) / (W - W.mean()).square().mean().sqrt(), atol=1e-5)
    assert [bank["key"] for bank in load(folder / "summary.json")["banks"]] == ["layers002-004.up"]
    run_in(tmp_path, "layer=2-4", "bank.scope=layers", *FEW)
    assert inner.fits == 1  # finished, and known to be


def test_the_jaccard_of_joined_families_compares_their_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sparse(FakeFit):
        """Up uses the first two atoms, gate the second and the third."""

        def __call__(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            result = super().__call__(*args, **kwargs)  # type: ignore[arg-type]
            codes = result.factors.codes
            codes[:6, 2:] = 0
            codes[6:, 0] = 0
            codes[6:, 3:] = 0
            return result

    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", Sparse())
    _, folder = run_in(tmp_path, "layer=4", "family=both", "bank.scope=families", *FEW)
    assert load(folder / "summary.json")["metrics"]["support_jaccard"] == pytest.approx(1 / 3)


def test_a_resumed_joined_fit_equals_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(fit: int, step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    options = ("layer=4-5", "bank.scope=layers", "train.checkpoint_every=0", *FEW)
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", FakeFit(stop))
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "a", *options)
    second = FakeFit()
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", second)
    _, cut = run_in(tmp_path / "a", *options)
    assert second.resumed_at == [2]
    _, whole = run_in(tmp_path / "b", *options)
    assert bytes_of(cut, "layers004-005.up") == bytes_of(whole, "layers004-005.up")


def test_a_run_of_joined_banks_patches_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bank for up and gate of a layer and one for two layers: factored, and written as dense weights."""
    from transformers import AutoModelForCausalLM

    from globe.embedded import path as embedded
    from globe.hf.patching import patch_model

    def model() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(embedded(), dtype=torch.float32).eval()

    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", FakeFit())
    tokens = torch.arange(40).view(2, 20)
    options = ("family=both", "layer=3-4", "bank.m=6", "bank.r=11", "export_dtype=float32", "train.steps=1")
    with torch.no_grad():
        before = model()(tokens).logits
        for scope in ("families", "layers"):
            _, folder = run_in(tmp_path, f"bank.scope={scope}", *options)
            dense, factored = model(), model()
            experts = {layer: dense.get_submodule(f"model.layers.{layer}.mlp.experts") for layer in (3, 4)}
            for artefact_folder in (folder / "banks").glob("*/globe.json"):
                artefact = read_artefact(artefact_folder.parent)
                W = rebuild(artefact)
                for member in artefact.members:
                    p = EMBEDDED.p
                    half = slice(0, p) if member.family == "gate" else slice(p, 2 * p)
                    experts[member.layer].gate_up_proj[:, half] = W[member.start : member.stop]  # type: ignore
            wanted = dense(tokens).logits
            patch_model(factored, folder)
            assert (wanted - before).abs().max() > 0.05  # a random bank changes what the model says
            assert torch.allclose(factored(tokens).logits, wanted, atol=2e-4)
