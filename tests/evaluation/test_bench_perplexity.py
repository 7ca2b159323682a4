"""The benchmark of perplexity against the kept ratio: what a cell is, what is done again, what is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from globe.errors import ConfigError
from globe.hf import load, patch_model
from scripts import load_script

SCRIPT = Path(__file__).parents[2] / "experiments" / "bench" / "perplexity.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script(SCRIPT, "bench_perplexity")


@pytest.fixture
def run_bench(
    bench: ModuleType,
    checkpoint_of: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Runs the command on the tiny checkpoint and gives what it prints: the tables alone."""

    def run(*more: str) -> str:
        arguments = [str(checkpoint_of()), "--text", str(text_file), "--max-tokens", "120", "--steps", "2"]
        arguments += ["--window", "16", "--stride", "8", "--out", str(tmp_path / "out"), *more]
        monkeypatch.setattr(sys, "argv", ["perplexity.py", *arguments])
        threads = torch.get_num_threads()
        try:
            bench.main()
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


def test_the_windows_are_spread_over_the_text(bench: ModuleType) -> None:
    windows = bench.spread_windows(1000, 200, window=16, stride=8)
    starts = sorted({one.start for one in windows})
    assert starts[0] == 0
    assert windows[-1].stop == 1000
    assert {one.stop - one.start for one in windows} <= {16, 10}
    covered = sorted({place for one in windows for place in range(one.start, one.stop)})
    assert len(covered) == 198
    assert sum(place < 100 for place in covered) < 70
    assert sum(450 <= place < 550 for place in covered) > 50
    counted = [place for one in windows for place in range(one.stop - one.scored, one.stop)]
    assert len(counted) == len(set(counted)) == 198 - 3
    assert bench.spread_windows(300, None, window=16, stride=8) == bench.sliding_windows(
        300, window=16, stride=8
    )
    assert bench.spread_windows(300, 400, window=16, stride=8)[-1].stop == 300
    assert bench.spread_windows(300, 20, window=16, stride=8)[-1].stop == 20


def figures(text: str, table: int) -> dict[str, list[str]]:
    """Rows of the table with this number, the stars of the best taken off."""
    found = text.split("\n\n")[-6:][table]
    rows = [
        [cell.strip().strip("*") for cell in line.split("|")[1:-1]] for line in found.strip().splitlines()
    ]
    return {row[0]: row[1:] for row in rows}


def test_cells_are_kept_and_only_what_is_missing_is_done(
    run_bench: Callable[..., str], bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_bench("--methods", "svd", "mobe", "--kept", "0.9")
    assert sorted(path.name for path in (tmp_path / "out" / "cells").iterdir()) == [
        "mobe-0.9.json",
        "svd-0.9.json",
    ]
    done: list[str] = []
    real = bench.globe.train.run

    def watched(node: Any, folder: Path) -> float:
        done.append(folder.name)
        return real(node, folder)

    monkeypatch.setattr(bench.globe.train, "run", watched)
    second = run_bench("--methods", "svd", "mobe", "--kept", "0.9", "0.7")
    assert [name[: name.rindex("-")] for name in done] == ["svd-0.7", "mobe-0.7"]
    assert figures(second, 0)["svd"][0] == figures(first, 0)["svd"][0]
    assert run_bench("--methods", "svd", "mobe", "--kept", "0.9", "0.7", "--table") == second
    done.clear()
    run_bench("--methods", "svd", "--kept", "0.9", "--max-tokens", "100")  # another text: measured again
    run_bench("--methods", "svd", "--kept", "0.9", "--max-tokens", "100", "--set", "normalise.scale=row")
    assert [name[: name.rindex("-")] for name in done] == ["svd-0.9", "svd-0.9"]
    assert done[0] != done[1]
    with pytest.raises(ConfigError, match="cells of several texts"):
        run_bench("--methods", "svd", "mobe", "--kept", "0.9", "--table")


def test_a_cell_is_the_run_put_into_the_model(
    run_bench: Callable[..., str], checkpoint_of: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """The figures are those of `globe.evaluate` on the same run."""
    import json

    from globe.config.command_line import parse_options
    from globe.evaluate import EvaluateOptions, evaluate

    shown = run_bench("--methods", "svd", "--kept", "0.8")
    (run,) = (tmp_path / "out" / "runs").iterdir()
    options = ["window=16", "stride=8", "max_tokens=120", f"text={text_file}"]
    expected = evaluate(parse_options(EvaluateOptions, [f"model={run}", *options]))
    cell = json.loads((tmp_path / "out" / "cells" / "svd-0.8.json").read_text())
    assert expected.divergence is not None
    assert cell["divergence"]["kl"] == pytest.approx(expected.divergence.kl, rel=1e-3)
    assert cell["perplexity"]["perplexity"] == pytest.approx(expected.perplexity.perplexity, rel=1e-5)
    assert cell["kept"] <= 0.8
    assert figures(shown, 0)["svd"] == [f"{expected.perplexity.perplexity:.2f}"]
    blocks = [one.block for one in expected.activation_errors]
    assert len(blocks) == 2
    assert cell["block_error"] == pytest.approx(sum(blocks) / 2, rel=1e-4)
    assert figures(shown, 3)["svd"] == [f"{cell['block_error']:.4f}"]
    assert figures(shown, 4)["svd"] == [f"{cell['relfrob']:.4f}"]


def test_one_cell_leaves_nothing_behind_for_the_next(
    run_bench: Callable[..., str],
    bench: ModuleType,
    checkpoint_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy starts from the original each time: a cell of layer 1 alone has the original's layer 0."""
    seen = []
    real = bench.score

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return real(model, *args, **kwargs)

    monkeypatch.setattr(bench, "score", watched)
    run_bench("--methods", "svd", "mobe", "--kept", "0.6", "--layers", "1", "--families", "up")
    whole = load(checkpoint_of()).state_dict()
    for state in seen:
        changed = {name for name, value in state.items() if not torch.equal(value, whole[name])}
        assert changed == {"model.layers.1.mlp.experts.gate_up_proj"}
    assert not torch.equal(*(state["model.layers.1.mlp.experts.gate_up_proj"] for state in seen))


def test_the_best_of_a_column_is_bold(bench: ModuleType) -> None:
    def cell(perplexity: float) -> dict[str, Any]:
        figures = {
            "perplexity": {"perplexity": perplexity},
            "divergence": {"kl": perplexity / 100, "top1_agreement": 0.9},
        }
        shared = {"original": {"perplexity": 40.0}, "settings": {"tokens": 7000, "window": 16, "stride": 8}}
        return {**figures, **shared, "relfrob": perplexity / 90, "block_error": perplexity / 80}

    cells = {("globe", 0.6): cell(41.0), ("svd", 0.6): cell(42.5), ("svd", 0.35): cell(44.0)}
    text = bench.markdown(cells, ("globe", "svd"), (0.6, 0.35))
    assert "Original: perplexity 40.00 on 7,000 tokens" in text
    assert "| globe | **41.00** | - |" in text
    assert "| svd | 42.50 | **44.00** |" in text
    assert "| globe | **0.41000** | - |" in text


def test_patching_dense_and_factored_agree_here(
    run_bench: Callable[..., str], checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    run_bench("--methods", "mobe", "--kept", "0.9")
    (run,) = (tmp_path / "out" / "runs").iterdir()
    ids = torch.arange(20)[None]
    dense = patch_model(load(checkpoint_of()), run, dense=True)(ids).logits
    factored = patch_model(load(checkpoint_of()), run)(ids).logits
    torch.testing.assert_close(dense, factored, rtol=1e-4, atol=1e-4)


def test_globe_searches_its_sizes_unless_they_are_given(
    run_bench: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    shown = run_bench("--methods", "globe", "mobe", "--kept", "0.9", "0.7", "--globe-sizes", "0.7=6,7,3")
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").iterdir()}
    assert 0.5 < cells["globe-0.9"]["kept"] <= 0.9
    assert len(list((tmp_path / "out" / "runs").glob("globe-0.9-*/frontier.json"))) == 1
    assert not list((tmp_path / "out" / "runs").glob("globe-0.7-*/frontier.json"))
    assert set(map(tuple, cells["globe-0.7"]["sizes"].values())) == {(6, 7)}
    assert len(figures(shown, 1)["globe"]) == 2
    with pytest.raises(ConfigError, match=r"globe would keep .* more than the 0.7 of the other methods"):
        run_bench("--methods", "globe", "--kept", "0.7", "--globe-sizes", "0.7=3,13")
    with pytest.raises(SystemExit):
        run_bench("--globe-sizes", "0.7:2,7")
    assert "0.7:2,7 is not understood" in capsys.readouterr().err
