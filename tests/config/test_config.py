"""The configuration: what composes, what a run is called, and which options make it another run."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from globe.checkpoint import open_checkpoint
from globe.config.composition import conf_dir, config_dict, plain, to_config
from globe.config.identity import identity, run_name
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.fit.plan import plan
from run_support import composed

CONF = Path(conf_dir())
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
EXPECTED = {
    "smoke", "minimal", "both_families", "all_layers", "ablation", "layers", "seeding", "homotopy",
    "activation", "search", "whole_model",
}  # fmt: skip


def with_hydra(*overrides: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def test_yaml_adds_nothing_to_the_defaults_of_the_schema() -> None:
    assert to_config(composed()) == Config()


def test_plain_and_config_dict_agree() -> None:
    node = composed("layer=[1,2]", "family=both", "schedule=homotopy")
    assert plain(node) == config_dict(to_config(node))


def values_of(sweep: str) -> list[str]:
    """What a sweep over one option tries: `a,b`, `choice(a,b)`, or the ends of `interval(a,b)`."""
    return re.sub(r"^(choice|interval)\((.*)\)$", r"\2", sweep).split(",")


def test_all_promised_experiments_are_there() -> None:
    assert set(EXPERIMENTS) >= EXPECTED


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_of_every_experiment_composes_and_fits_the_embedded_model(name: str) -> None:
    settings = with_hydra(f"experiment={name}").hydra
    sweep = settings.sweeper.params or {}
    assert bool(sweep) == (str(settings.mode) == "RunMode.MULTIRUN")
    choices = [[f"{key}={value}" for value in values_of(str(values))] for key, values in sweep.items()]
    checkpoint = open_checkpoint(None)
    names = set()
    every = 7 if name == "search" else 1  # it tries few of its combinations itself
    combinations = list(itertools.product(*choices))[::every]
    for overrides in combinations:
        node = composed(f"experiment={name}", *overrides)
        config = to_config(node)
        assert plan(config, checkpoint)
        if sweep:
            assert config.sweep == name
        names.add(run_name(plain(node)))
    assert len(names) == len(combinations)


@pytest.mark.parametrize("group", ["method", "model", "init", "schedule", "wandb"])
def test_every_option_of_every_group_composes(group: str) -> None:
    for path in (CONF / group).glob("*.yaml"):
        assert to_config(composed(f"{group}={path.stem}"))


# --- names and identity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["bank.m=n/4", "bank.r=3p/4"],
        ["bank.m=3*n/4", "codes.target_support=m/2"],
        ["layer=[4-8,12]"],
        ["layer=all", "family=both"],
        ["model=qwen15_moe"],
        ["model.path=/some/where/a model/"],
        ["model.path=.."],
        ["layer='x=y/z: \\n'"],
        ["bank.m=''"],
        [f"layer=[{','.join(str(one) for one in range(60))}]"],
    ],
)
def test_a_run_name_is_one_folder_name(overrides: list[str]) -> None:
    name = run_name(plain(composed(*overrides)))
    assert Path(name).name == name
    assert not set(name) & set("/\\ =:*?\"'<>|\n")
    assert not name.startswith(".")
    assert len(name) < 128


def test_the_run_and_sweep_folders_come_from_the_name() -> None:
    node = with_hydra("bank.m=n/8", "output=results", "sweep=mine")
    name = run_name(plain(node))
    assert "nover8" in name
    assert OmegaConf.select(node, "hydra.run.dir") == f"results/{name}"
    assert OmegaConf.select(node, "hydra.sweep.dir") == "results/mine"
    assert OmegaConf.select(node, "hydra.sweep.subdir") == name


def test_identity_is_blind_to_where_a_run_happens_and_who_watches() -> None:
    base = identity(plain(composed()))
    for override in (
        "device=cpu",
        "threads=3",
        "output=elsewhere",
        "sweep=other",
        "overwrite=true",
        "dry_run=true",
        "S_cache=4",
        "objectives=[relfrob,kept]",
        "bank.m=n/4",
        "bank.r=p/2",
        "wandb=offline",
        "wandb.tags=[a]",
        "wandb.log_every=7",
        "train.checkpoint_every=1",
        "model.force_download=true",
        "calibrate.batch=3",
        "calibrate.out=elsewhere",
    ):
        assert identity(plain(composed(override))) == base, override


def _changed(value: object) -> str:
    """Another value of the same kind."""
    match value:
        case bool():
            return str(not value).lower()
        case int() | float():
            return str(value + 1)
        case None:
            return "3"
        case _:
            return f"{value}x"


def test_identity_sees_every_other_option() -> None:
    # without a text the options of a calibration change nothing, nor without a limit those of serving
    node = composed("calibrate.text=embedded", "serve.speed=1.1")
    base = plain(node)
    blind = (
        "output", "sweep", "overwrite", "dry_run", "wandb", "device", "threads", "S_cache", "objectives",
    )  # fmt: skip
    blind_in = {
        "train": ("checkpoint_every",),
        "model": ("force_download",),
        "normalise": ("store",),
        "calibrate": ("batch", "out"),
    }

    def leaves(tree: dict[str, object], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        found = []
        for key, value in tree.items():
            here = (*path, key)
            found += leaves(value, here) if isinstance(value, dict) else [here]
        return found

    seen = {identity(base)}
    for path in leaves(base):
        if path[0] in blind or path[-1] in blind_in.get(path[0], ()):
            continue
        changed = plain(node)
        inner: dict[str, object] = changed
        for key in path[:-1]:
            inner = inner[key]  # type: ignore[assignment]
        inner[path[-1]] = _changed(inner[path[-1]])
        assert identity(changed) not in seen, path
        seen.add(identity(changed))
    assert len(seen) > 50


def test_a_checkpoint_folder_counts_by_its_place_and_not_by_its_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    spellings = ["model.path=model", "model.path=./model/", f"model.path={tmp_path}/model"]
    assert len({run_name(plain(composed(one))) for one in spellings}) == 1


# --- what only code can refuse --------------------------------------------------------------------------------------


def test_an_option_added_with_a_plus_is_refused() -> None:
    with pytest.raises(ConfigError, match="extra is not an option: give one of family, layer"):
        to_config(composed("+extra=1"))


def test_a_curve_names_the_schedule_it_belongs_to() -> None:
    with pytest.raises(
        ConfigError, match=r"^schedule\.beta\.hold=0\.5 .* at most 0\.25, what schedule\.beta\.warmup"
    ):
        to_config(composed("schedule.beta.warmup=0.75", "schedule.beta.hold=0.5"))
    with pytest.raises(ConfigError, match=r"^schedule\.lam\.start=0\.0 .*schedule\.lam\.kind=exponential"):
        to_config(composed("schedule.lam.kind=exponential", "schedule.lam.start=0"))


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize(
    "key", ["train.damping", "train.lambda_B", "codes.l1", "init.scale", "train.tolerance"]
)
def test_numbers_that_are_not_finite_are_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        to_config(composed(f"{key}={value}"))


# --- where conf/ is -------------------------------------------------------------------------------------------------


def test_conf_of_the_checkout_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(conf_dir()) == Path(__file__).parents[2] / "conf"


@pytest.mark.slow
def test_a_wheel_carries_conf_and_runs_from_it(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    try:
        import hatchling  # noqa: F401
    except ImportError:
        build.remove("--no-build-isolation")
    subprocess.run([*build, str(root)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import globe.config.composition as c; print(c.conf_dir()); "
    code += "from globe.train import main; sys.argv = ['train', '--cfg', 'job', 'experiment=smoke']; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(site / "globe" / "conf")
    assert {"family: up", "  steps: 10"} <= set(lines)
