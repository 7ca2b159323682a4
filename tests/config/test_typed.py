"""What is typed after `globe.train` reaches the configuration letter by letter, whatever Hydra makes of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from globe.config.composition import conf_dir, register, to_config
from globe.config.layers import parse_layers
from globe.config.schema import Config
from globe.config.size_expressions import default_size, resolve_size
from globe.config.typed import as_typed
from globe.errors import ConfigError


def typed(*arguments: str) -> Config:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        return to_config(compose("config", overrides=as_typed(arguments)))


@pytest.mark.parametrize(
    "text",
    ["2026_11_29", "0123", "dense #2", "/a=b/m", "1e3", "it's", "a,b", "true", 'say "no"', "[x]", "back\\"],
)
def test_a_path_is_what_was_typed(text: str) -> None:
    assert typed(f"output={text}").output == text
    assert typed(f"model.path={text}").model.path == text
    assert typed(f"model.revision={text}").model.revision == text


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert typed("model.path=~/m", "output=~").output == "/somewhere"
    assert typed("model.path=~/m").model.path == "/somewhere/m"
    assert typed("sweep=~x").sweep == "~x", "a name, no path"
    with pytest.raises(ConfigError, match="no such home folder"):
        typed("output=~nobody-of-this-name/x")


def test_null_stays_nothing_and_an_empty_path_is_refused() -> None:
    assert typed("model.path=null").model.path is None
    for key in ("output", "model.path", "hydra.run.dir", "hydra.sweep.dir"):
        for empty in ("", " "):
            with pytest.raises(ConfigError, match=f"{key}= is empty"):
                as_typed([f"{key}={empty}"])


def test_quotes_that_were_typed_are_those_of_hydra() -> None:
    assert typed("output='a b'").output == "a b"


def test_a_model_may_be_given_as_in_the_other_commands(tmp_path: Path) -> None:
    assert typed("model=Qwen/Qwen3-30B-A3B").model.path == "Qwen/Qwen3-30B-A3B"
    assert typed(f"model={tmp_path}").model.path == str(tmp_path)
    assert typed("model=embedded").model.path is None


def test_commas_separate_the_values_of_a_sweep() -> None:
    parser = OverridesParser.create()
    for given, values in (
        ("model.path=a#1,b", ["a#1", "b"]),
        ("bank.m=round(n/8),n/4", ["round(n/8)", "n/4"]),
        ("bank.m=choice(round(n/8),2)", ["round(n/8)", "2"]),
    ):
        override = parser.parse_override(as_typed(["-m", given])[1])
        found = [getattr(one, "text", one) for one in override.sweep_iterator()]
        assert [str(one) for one in found] == values
    assert as_typed(["-m", "output=a,b"])[1] == "output='a,b'"


@pytest.mark.parametrize(
    ("text", "n", "size"),
    [
        ("round(n/8)", 60, 8),
        ("round(n/8)", 59, 7),
        ("floor(n/8)", 60, 7),
        ("ceil( 3n/8 )", 9, 4),
        ("round(n/8)", 8, 1),
    ],
)
def test_expressions_round_when_asked(text: str, n: int, size: int) -> None:
    assert resolve_size("bank.m", text, {"n": n}, n, "the experts") == size


@pytest.mark.parametrize("text", ["round(n/8", "round()", "round(round(n", "sin(n)", "floor(q/2)"])
def test_other_calls_are_not_understood(text: str) -> None:
    with pytest.raises(ConfigError, match="is not understood"):
        resolve_size("bank.m", text, {"n": 60}, 60, "the experts")


@pytest.mark.parametrize("text", ["~x", "x" * 5000, "a\0b", "~nosuch/model"])
def test_what_is_no_path_for_a_model_is_no_traceback(text: str) -> None:
    with suppress(ConfigError):
        as_typed([f"model={text}"])


@pytest.mark.parametrize(("n", "m"), [(2, 1), (6, 2), (7, 2), (60, 15), (103, 26)])
def test_a_size_that_nobody_typed_is_rounded(n: int, m: int) -> None:
    assert default_size("n/4", {"n": n}, n) == m


def test_what_is_typed_for_a_size_reaches_it() -> None:
    assert typed("bank.m=round(n/8)").bank.m == "round(n/8)"
    assert typed("experiment=minimal").bank.m == "round(n/4)"
    assert typed("threads=1024").threads == 1024
    with pytest.raises(ConfigError, match=r"threads=1025 is not possible: .* at most 1024"):
        typed("threads=1025")


def test_the_middle_layer_is_that_of_the_model_at_hand() -> None:
    assert parse_layers(None, range(24), 24) == (12,)
    assert parse_layers(None, (1, 3, 5), 7) == (3,)
    assert parse_layers(None, (0,), 1) == (0,)


@pytest.mark.parametrize(
    ("n", "p", "d"), [(60, 88, 128), (64, 44, 70), (128, 33, 65), (8, 15, 21), (16, 45, 64)]
)
def test_the_sizes_of_the_ablation_exist_for_every_number_of_experts(n: int, p: int, d: int) -> None:
    params = OmegaConf.load(Path(conf_dir()) / "experiment" / "ablation.yaml").hydra.sweeper.params
    for key, symbols, limit in (
        ("bank.m", {"n": n}, n),
        ("bank.r", {"p": p, "d": d}, min(p, d)),
        ("codes.target_support", {"m": max(1, n // 8)}, max(1, n // 8)),
    ):
        values = OverridesParser.create().parse_override(f"{key}={params[key]}").sweep_iterator()
        for value in (getattr(one, "text", one) for one in values):
            if value is not None:
                assert 1 <= resolve_size(key, value, symbols, limit, "the limit") <= limit
