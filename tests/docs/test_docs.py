"""The documentation is true of the code: its commands parse, its links resolve, its sentences exist."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save_file

import globe
from globe import patch
from globe.calibrate import CalibrateOptions
from globe.checkpoint import architecture, known_model_types, open_checkpoint
from globe.checkpoint.quantised.schemes import METHODS
from globe.config.command_line import parse_options
from globe.config.composition import conf_dir, register, to_config
from globe.errors import ConfigError
from globe.evaluation.options import EvaluateOptions
from scripts import load_script

register()
ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "globe"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# --- reading a page -------------------------------------------------------------------------------------------------


def code_blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of every fenced block, and ("", code) of every indented one."""
    fence: str | None = None
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("```"):
            if fence is None:
                fence = line.strip("`").strip()
            else:
                yield fence, "\n".join(lines)
                fence = None
            lines = []
        elif fence is not None:
            lines.append(line)
        elif line.startswith("    "):
            lines.append(line[4:])
        elif lines and not line.strip():
            yield "", "\n".join(lines)
            lines = []


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in a block that is not Python or output; \\ continues a line."""
    for language, code in code_blocks(text):
        if language not in ("", "bash", "sh", "shell"):
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(one) for one in re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE)}


def test_the_reader_of_pages_sees_commands_and_no_output() -> None:
    text = "Text:\n\n    A=1 make x  # why\n    python -m a 'b=[c]'\n\n"
    text += "```text\nmake no\n```\n```bash\nmake \\\n  y\n```\n"
    assert list(commands(text)) == [["make", "x"], ["python", "-m", "a", "b=[c]"], ["make", "y"]]
    assert [language for language, _ in code_blocks(text)] == ["", "text", "bash"]
    assert slug("`S_cache`: memory or speed") == "s_cache-memory-or-speed"


# --- commands -------------------------------------------------------------------------------------------------------


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) [?:]?=", (ROOT / "Makefile").read_text(), re.MULTILINE)) | {
        "PYTHON"
    }
    for word in words:
        name, given, _ = word.partition("=")
        assert name in (variables if given else targets), word


def check_train(words: list[str]) -> None:
    """Composed and checked as Hydra and the entry point do; of a sweep, every run up to twenty."""
    given = get_args_parser().parse_args(words)
    plugins = [one for one in given.overrides if one.startswith(("hydra/launcher=", "hydra/sweeper="))]
    overrides = [one for one in given.overrides if one not in plugins and not one.startswith("hydra.")]
    for plugin in plugins:
        group, _, name = plugin.partition("=")
        own = (Path(conf_dir()) / group / f"{name}.yaml").is_file()
        extra = any(name.startswith(one) for one in PROJECT["optional-dependencies"])
        assert own or extra or name == "basic", plugin
    parsed = OverridesParser.create().parse_overrides(overrides)
    batches = BasicSweeper.split_arguments(parsed, None)[0] if given.multirun else [overrides]
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        for batch in batches[:20]:
            to_config(compose("config", overrides=[one for one in batch if not one.startswith("hydra.")]))


def check_patch(words: list[str]) -> None:
    assert patch.parse(words)


def check_evaluate(words: list[str]) -> None:
    assert parse_options(EvaluateOptions, words)


def check_calibrate(words: list[str]) -> None:
    assert parse_options(CalibrateOptions, words, positional="model")


def check_module(words: list[str]) -> None:
    """Another module of ours that parses `KEY=VALUE` words by its own `parse`; any other one has to exist."""
    module = importlib.import_module(words[0])
    parse = getattr(module, "parse", None)
    if words[0].startswith("globe.") and parse is not None and "--help" not in words:
        assert parse(words[1:])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "globe.train": check_train,
    "globe.patch": check_patch,
    "globe.evaluate": check_evaluate,
    "globe.calibrate": check_calibrate,
}
HARMLESS = ("source", "cd", "cp", "mkdir", "git", "pip", "wandb", ".venv/bin/pre-commit")


def check(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        check_make(rest)
    elif program == "torchrun":
        at = rest.index("-m") if "-m" in rest else rest.index("--module")
        CHECKS[rest[at + 1]](rest[at + 2 :])
    elif program.endswith("python") and rest[0] == "-m":
        CHECKS.get(rest[1], lambda arguments: check_module(rest[1:]))(rest[2:])
    elif program.endswith("python"):
        assert (ROOT / rest[0]).is_file(), rest[0]
    else:
        assert program in HARMLESS, words


@pytest.mark.parametrize("name", NAMES)
def test_every_command_parses(name: str) -> None:
    for words in commands((ROOT / name).read_text()):
        if "--help" not in words:
            check(words)


@pytest.mark.parametrize(
    "line",
    [
        "python -m globe.train bank.mm=3",
        "python -m globe.train experiment=minimum",
        "python -m globe.train hydra/launcher=rocket",
        "python -m globe.patch run=a out=b fmt=dense",
        "python -m globe.evaluate model=a windows=3",
        "python -m globe.calibrate model=a tokens=0",
        "python experiments/nothing.py",
        "make demoo",
        "make demo ARG=1",
        "rm -rf outputs",
    ],
)
def test_a_command_that_is_wrong_is_found(line: str) -> None:
    with pytest.raises((AssertionError, ConfigError, HydraException, OmegaConfBaseException)):
        check(shlex.split(line))


@pytest.mark.parametrize("name", NAMES)
def test_every_python_example_is_python_and_imports_what_exists(name: str) -> None:
    for language, code in code_blocks((ROOT / name).read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("globe"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, one.name) for one in node.names), ast.unparse(node)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "globe":
                assert hasattr(globe, node.attr) or importlib.import_module(f"globe.{node.attr}"), node.attr


# --- links and pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_internal_link_resolves(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name}: {target}"
        assert ROOT in file.parents or file == ROOT
        is_code, is_picture = path.startswith(("../src/", "../examples/")), path.endswith(".svg")
        if name.startswith("docs/") and not (is_code or is_picture):
            assert file.parent == page.parent, f"{name}: {target} leaves docs/, where the site can't follow"
        if anchor:
            assert anchor in anchors(file), f"{name}: {target}"


CODE = re.compile(r"\[`([^\]`]+)`\]\((\.\./(?:src|examples)/[^)\s]+)\)")


def test_every_formula_of_the_method_names_what_computes_it() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    after = re.split(r"^```math$.*?^```$", text, flags=re.DOTALL | re.MULTILINE)[1:]
    assert len(after) > 10
    for rest in after:
        assert rest.lstrip().startswith("Computed in [`"), rest[:80]
    links = CODE.findall(text)
    assert len(links) > 15
    for name, target in links:
        file = ROOT / "docs" / target
        defined = re.findall(r"^(?:def|class) (\w+)", file.read_text(), re.MULTILINE)
        assert name in defined or target.endswith(name), f"{name} is not in {target}"


def test_the_site_names_files_it_does_not_have() -> None:
    hook = load_script(ROOT / "experiments" / "docs" / "formulas.py")
    seen = hook.on_page_markdown(
        "see [`refit`](../src/globe/am/refit.py), [`examples/a.py`](../examples/a.py) [x](y.md)"
    )
    assert seen == "see `refit` in `src/globe/am/refit.py`, `examples/a.py` [x](y.md)"
    for page in (ROOT / "docs").glob("*.md"):
        assert "](../" not in hook.on_page_markdown(page.read_text()), page.name


def test_the_site_needs_no_network() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert site["theme"]["font"] is False
    for file in [*site.get("extra_css", []), *site.get("extra_javascript", [])]:
        assert (ROOT / "docs" / file).is_file()


def test_every_formula_becomes_mathml_with_nothing_left_of_latex() -> None:
    hook = load_script(ROOT / "experiments" / "docs" / "formulas.py")
    config = hook.on_config({"mdx_configs": {}})
    (fence,) = config["mdx_configs"]["pymdownx.superfences"]["custom_fences"]
    formulas = [
        code for page in PAGES for language, code in code_blocks(page.read_text()) if language == "math"
    ]
    assert len(formulas) > 5
    for formula in [*formulas, r"\Big\lVert x"]:
        drawn = fence["format"](formula)
        assert drawn.startswith('<div class="formula"><math ')
        assert ("\\" in drawn) == (formula == r"\Big\lVert x"), formula


def test_the_site_has_every_page_once_and_the_overview_links_to_all() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [file for entry in site["nav"] for file in entry.values()]
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert sorted(listed) == sorted(pages)
    overview = (ROOT / "docs" / "index.md").read_text()
    assert all(f"({page})" in overview for page in pages - {"index.md"})


# --- what a page says of the code -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load_script(ROOT / "experiments" / "docs" / "reference.py")


def test_the_configuration_reference_is_what_the_dataclasses_say(reference: ModuleType) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference.render(), "run make docs-reference"


def test_presets_are_files_and_the_table_is_what_is_counted() -> None:
    presets = load_script(ROOT / "experiments" / "docs" / "presets.py")
    page = (ROOT / "docs" / "architectures.md").read_text()
    assert f"<!-- presets -->\n{presets.render()}\n<!-- end of presets -->" in page, (
        "run experiments/docs/presets.py"
    )
    names = {file.stem for file in (ROOT / "conf" / "model").glob("*.yaml")}
    assert names == {*presets.PRESETS, "embedded"}
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        for name, preset in presets.PRESETS.items():
            composed = to_config(compose("config", overrides=[f"model={name}"]))
            assert composed.model.path == preset.path
            text = (ROOT / "conf" / "model" / f"{name}.yaml").read_text()
            assert (
                f"{preset.n} routed experts of {preset.p} x {preset.d} in each of {preset.layers} layers"
                in text
            )


def test_the_citation_is_whole_and_names_what_the_method_page_cites() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "type", "authors", "version", "license", "references"} <= set(
        cited
    )
    assert cited["version"] == PROJECT["version"] == globe.__version__
    assert cited["license"] == PROJECT["license"]
    page = (ROOT / "docs" / "method.md").read_text()
    for one in cited["references"]:
        assert {"type", "title", "authors", "year"} <= set(one)
        for identifier in one.get("identifiers", []):
            assert identifier["value"].replace("arXiv:", "arXiv ") in page


def test_every_option_has_a_meaning(reference: ModuleType) -> None:
    from globe.config.fit_options import CurveConfig
    from globe.config.schema import Config

    kinds = [
        ("", Config),
        *((f"{name}.", kind) for name, kind in reference.groups()),
        ("curve.", CurveConfig),
    ]
    listed = [option for prefix, kind in kinds for option in reference.options(kind, prefix)]
    assert len(listed) > 60
    assert [option.key for option in listed if not option.meaning] == []


def constant_texts() -> set[str]:
    """Every string constant of the package; of an f-string the parts between the values."""
    return {
        node.value
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_every_error_that_is_explained_can_happen() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    sentences = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    texts = constant_texts()
    assert len(sentences) > 30
    assert [one for one in sentences if not any(one in text for text in texts)] == []


def test_the_table_of_architectures_is_that_of_the_package() -> None:
    page = (ROOT / "docs" / "architectures.md").read_text()
    listed = re.search(r"<!-- architectures -->(.*)<!-- end -->", page, re.DOTALL)
    assert listed is not None
    assert tuple(re.findall(r"`(\w+)`", listed[1])) == known_model_types()


def test_the_table_of_quantisations_is_that_of_the_package() -> None:
    page = (ROOT / "docs" / "architectures.md").read_text()
    listed = re.search(r"<!-- quantised -->(.*)<!-- end of quantised -->", page, re.DOTALL)
    assert listed is not None
    assert re.findall(r"^\| `([\w-]+)` \|", listed[1], re.MULTILINE)[1:] == list(METHODS)


def test_the_worked_example_of_an_architecture_reads_what_was_planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "architectures.md").read_text()
    config, described = (json.loads(code) for language, code in code_blocks(page) if language == "json")
    (shown,) = [code for language, code in code_blocks(page) if language == "text"]
    folder, table = tmp_path / "heron", tmp_path / "architectures"
    folder.mkdir()
    table.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (table / "heron_moe.json").write_text(json.dumps(described))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["n_blocks"]):
        for name, sizes in re.findall(r"^(\S+) +\(([\d, ]+)\)$", shown, re.MULTILINE):
            shape = [int(size) for size in sizes.split(",")]
            tensors[name.replace(".0.", f".{layer}.")] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(architecture, "_FOLDER", table)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.moe_layers == (0, 1)
    n, rows = config["moe"]["n_experts"], config["moe"]["expert_size"]
    found = checkpoint.shape(1, "up")
    assert (found.n, found.p, found.d) == (n, rows, config["hidden"])
    both = tensors["encoder.blocks.1.moe.w_in"]
    for family, part in (("gate", slice(0, rows)), ("up", slice(rows, 2 * rows))):
        read = checkpoint.read_experts(1, family)
        torch.testing.assert_close(read.weights, both[:, part], rtol=0, atol=0)
    shared: Any = checkpoint.read_experts(0, "gate", include_shared=True)
    torch.testing.assert_close(shared.weights[-1], tensors["encoder.blocks.0.shared.gate"], rtol=0, atol=0)
