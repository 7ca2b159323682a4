"""The dry run: what it prints, that it leaves no trace, and that its prediction is put together as it says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import globe.fit.one_bank
import globe.sizes.dry_run
import globe.sizes.timing
from globe.am.loop import fit_bank
from globe.am.records import Sizes
from globe.checkpoint import Checkpoint, ExpertShape, ShardReader, open_checkpoint
from globe.checkpoint.in_memory import ExpertsInMemory
from globe.config.composition import to_config
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.fit.options import fit_options
from globe.fit.plan import outline, plan
from globe.hf.globe_checkpoint import write_globe
from globe.hf.run_banks import open_run
from globe.runs.folder import RunFolder, State
from globe.sizes.chosen import choose_sizes
from globe.sizes.costs import average_work, chunk_of, fit_bytes, reference_seconds, step_work
from globe.sizes.dry_run import bytes_of, metric_numbers
from globe.sizes.sizing import Sizing
from run_support import EMBEDDED, composed, run_in

SIZES = Sizes(12, 20, 28, 5, 9)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel runs once and takes a millisecond, whatever the machine is doing."""

    def once(kernel: object, device: object) -> float:
        kernel()  # type: ignore[operator]
        return 1e-3

    monkeypatch.setattr(globe.sizes.timing, "_time", once)


def forbidden(*args: object, **kwargs: object) -> object:
    raise AssertionError("a dry run must not fit")


def test_a_dry_run_prints_every_bank_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", forbidden)
    figure, folder = run_in(tmp_path, "dry_run=true", "layer=3-4", "family=both", "bank.m=n/8")
    assert math.isnan(figure)
    assert not folder.exists()
    printed = capsys.readouterr().out
    for key in ("layer003.up", "layer003.gate", "layer004.up", "layer004.gate", "16 x 48 x 64", "MiB"):
        assert key in printed
    assert "43.8%" in printed  # 24/64 + 2 24/(16 48) + 2/(48 64)


def test_a_dry_run_of_a_run_that_is_there_leaves_its_status_alone(tmp_path: Path, quick: None) -> None:
    options = ("train.steps=1", "model.max_experts=6", "bank.m=2", "bank.r=5")
    _, folder = run_in(tmp_path, *options)
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    run_in(tmp_path, "dry_run=true", *options)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    with pytest.raises(ConfigError, match="threads"):
        run_in(tmp_path, "dry_run=true", "threads=0", *options)
    status = RunFolder(folder).status
    assert status is not None
    assert status.state is State.finished


def test_within_a_budget_it_shows_the_candidates_and_does_not_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    run_in(tmp_path, "dry_run=true", "bank.kept=0.47", "layer=3-5")
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if "16 x 48 x 64" in line and "KiB" in line]
    assert len(rows) > 5  # once, for all three layers
    assert all("3 banks" in row for row in rows)
    assert "chooses among these" in printed
    assert not list(tmp_path.iterdir())


def test_other_methods_show_sizes_and_what_they_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in(tmp_path, "dry_run=true", "method=slbf", "bank.m=3", "bank.r=11", "layer=3")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "layer003.up" in line]
    assert [cell.strip() for cell in row.strip("│|").split("│")][2:5] == ["16", "11", "1"]


def test_wrong_options_are_refused_as_in_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bank\.m=17 is more than the 16 experts"):
        run_in(tmp_path, "dry_run=true", "bank.m=17")
    with pytest.raises(ConfigError, match=r"bank\.kept=0\.01 is too small"):
        run_in(tmp_path, "dry_run=true", "bank.kept=0.01")


# --- sizes and totals -------------------------------------------------------------------------------------------------


class Large(Checkpoint):
    """Experts of real sizes in bfloat16, of which there is nothing but the shapes."""

    def __init__(self, *shape: int, layers: int = 5) -> None:
        self.num_layers, self._size = layers + 1, ExpertShape(*shape)
        self.config = {}

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(range(1, self.num_layers))

    @property
    def stored_bytes(self) -> int:  # type: ignore[override]
        return 10**12

    dense_only = None

    @property
    def plain_bytes(self) -> int:  # type: ignore[override]
        return 10**12

    def shape(self, layer: int, family: str) -> ExpertShape:
        return self._size

    def dtype(self, layer: int, family: str) -> torch.dtype:
        return torch.bfloat16


LARGE = [(60, 1408, 2048), (128, 768, 2048), (256, 2048, 7168), (60, 88, 256), (8, 14336, 4096)]


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("words", [[], ["codes.target_support=5"], ["train.dictionary=mod"]])
def test_candidates_for_large_experts_fill_the_budget(shape: tuple[int, int, int], words: list[str]) -> None:
    """They are sizes of the whole experts, though the search fits them in small blocks."""
    config = to_config(composed("bank.kept=0.5", "layer=3", *words))
    (bank,) = outline(config, Large(*shape))
    plans = globe.sizes.dry_run.candidate_plans(config, bank)
    assert len(plans) > 2
    assert len({one.sizes for one in plans}) == len(plans)
    for one in plans:
        assert (one.sizes.n, one.sizes.p, one.sizes.d) == shape
        assert 0.4 < one.kept <= 0.5, one.sizes
        assert one.sizes.target_support in (None, 5)
        assert one.sizes.m >= (one.sizes.target_support or 1)


def test_the_run_takes_sizes_between_those_shown(tmp_path: Path, quick: None) -> None:
    """n = 9 experts of 160 x 200 are probed in a block, as globe-ref's are."""
    experts = torch.randn(9, 160, 200, generator=torch.Generator().manual_seed(3))
    words = ["bank.kept=0.5", "budget.seconds=0.3", "train.steps=12", "layer=0", "train.dictionary=mod"]
    config = to_config(composed(*words))
    source = ExpertsInMemory({(0, "up"): experts}, model_type="tensors")
    (bank,) = outline(config, source)
    plans = globe.sizes.dry_run.candidate_plans(config, bank)
    sizing = Sizing(source, torch.device("cpu"), quiet=True)
    found = choose_sizes(config, [bank], sizing, tmp_path / "f.json")
    chosen = found[bank.shape]
    frontier = json.loads((tmp_path / "f.json").read_text())["shapes"]["9x160x200"]["frontier"]
    assert frontier["rounds"][0]["block"]["p"] < 160
    dense = sorted((one.sizes.m, one.sizes.r) for one in plans if one.sizes.atom_rank is None)
    assert dense[0][0] <= chosen.m <= dense[-1][0]
    assert dense[-1][1] <= chosen.r <= dense[0][1]
    assert all(0.45 < one.kept <= 0.5 for one in plans)


def test_one_candidate_is_measured_and_the_others_follow_from_their_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[Sizes] = []

    def measured(config: Config, sizes: Sizes, device: torch.device) -> float:
        timed.append(sizes)
        return 30.0

    monkeypatch.setattr(globe.sizes.timing, "seconds_per_step", measured)
    config = Config()
    few, some, many = (Sizes(60, 1408, 2048, m, r) for m, r in ((1, 900), (8, 700), (60, 380)))
    other = Sizes(60, 704, 2048, 8, 300)
    found = globe.sizes.timing.seconds_of_steps(config, [few, many, some, other, some], torch.device("cpu"))
    assert set(found) == {few, some, many, other}
    assert len(timed) == 2
    middle = timed[0]
    assert (found[middle], found[other]) == (pytest.approx(30.0), pytest.approx(30.0))
    for one in (few, some, many):
        ratio = reference_seconds(average_work(config, one)) / reference_seconds(average_work(config, middle))
        assert found[one] == pytest.approx(30 * ratio)


def test_totals_are_those_of_all_banks_and_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(config: Config, sizes: Sizes, device: torch.device) -> float:
        return 50.0

    monkeypatch.setattr(globe.sizes.timing, "seconds_per_step", measured)
    config = to_config(composed("bank.kept=0.5", "layer=all", "family=both", "train.steps=60"))
    model = Large(60, 1408, 2048, layers=24)
    found = globe.sizes.dry_run.predict(config, model, torch.device("cpu"))
    whole = globe.sizes.dry_run.totals(config, model, found)
    assert whole.banks == 48
    assert {one.count for one in found} == {48}
    numbers = 60 * 1408 * 2048
    assert whole.seconds is not None
    longest = max(one.seconds for one in found if one.seconds is not None)
    assert whole.seconds[1] == pytest.approx(48 * 60 * longest + config.budget.seconds)
    assert whole.seconds[0] < whole.seconds[1]
    assert 0.45 * 48 * numbers * 2 < whole.file_bytes[0] <= whole.file_bytes[1] < 0.501 * 48 * numbers * 2
    saved = 10**12 - whole.patched_bytes[1]
    assert 0.499 * 48 * numbers * 2 < saved < 0.55 * 48 * numbers * 2
    lines = globe.sizes.dry_run.sentences(config, whole)
    assert lines[1].startswith("48 banks: ")
    assert " h to " in lines[1]
    assert " GiB of memory" in lines[1]


def stored(folder: Path) -> int:
    reader = ShardReader(folder)
    return sum(reader.entry(name).nbytes for name in reader.names)


def test_file_sizes_are_those_that_are_written(tmp_path: Path, quick: None) -> None:
    options = ("train.steps=1", "layer=3-4", "bank.m=3", "bank.r=11", "normalise.scale=row")
    _, folder = run_in(tmp_path, *options)
    config, checkpoint = to_config(composed(*options)), open_checkpoint(None)
    found = globe.sizes.dry_run.predict(config, checkpoint, torch.device("cpu"))
    whole = globe.sizes.dry_run.totals(config, checkpoint, found)
    tensors = [load_file(file) for file in folder.glob("banks/*/bank.safetensors")]
    assert whole.file_bytes == (sum(one.nbytes for each in tensors for one in each.values()),) * 2
    write_globe(open_run(folder), checkpoint, tmp_path / "compact")
    assert whole.patched_bytes == (stored(tmp_path / "compact"),) * 2
    assert whole.model_bytes == stored(checkpoint.folder)


# --- how it predicts --------------------------------------------------------------------------------------------------


def test_a_step_is_put_together_from_its_kernels(quick: None) -> None:
    config = Config()
    config.codes.every, config.train.evaluate_every, config.train.cg_iterations = 4, 2, 7
    # 0 and 4 iterations take equally long under the fixture, so that an iteration costs nothing
    expected = 1 + (1.15 + 1 / 2 + 2 / 4) + 1 / 4
    device = torch.device("cpu")
    assert globe.sizes.timing.seconds_per_step(config, SIZES, device) == pytest.approx(1e-3 * expected)
    config.codes.every = 0
    low_rank = replace(SIZES, atom_rank=3)
    assert globe.sizes.timing.seconds_per_step(config, low_rank, device) == pytest.approx(
        1e-3 * (1 + 1.15 + 1 / 2)
    )


def test_many_experts_are_extended_from_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def linear(config: Config, sizes: Sizes, device: torch.device) -> float:
        timed.append(sizes.n)
        return 0.5 + 0.25 * sizes.n

    monkeypatch.setattr(globe.sizes.timing, "_timed_step", linear)
    sizes = Sizes(200, 300, 400, 6, 150)
    assert globe.sizes.timing.seconds_per_step(Config(), sizes, torch.device("cpu")) == pytest.approx(
        0.5 + 0.25 * 200
    )
    assert max(timed) == 2 * chunk_of(sizes, itemsize=2) < 200


@given(
    n=st.integers(2, 40),
    p=st.integers(2, 60),
    d=st.integers(2, 60),
    m=st.integers(1, 9),
    r=st.integers(1, 30),
)
def test_costs_rise_with_every_size(n: int, p: int, d: int, m: int, r: int) -> None:
    sizes = Sizes(n, p, d, m, r)
    work, memory = step_work(sizes, cg_iterations=10), fit_bytes(sizes, itemsize=4, source_itemsize=2)
    for name in ("n", "p", "d", "m", "r"):
        more = replace(sizes, **{name: 2 * getattr(sizes, name)})
        assert step_work(more, cg_iterations=10) > work
        assert fit_bytes(more, itemsize=4, source_itemsize=2) >= memory
    assert fit_bytes(sizes, itemsize=8, source_itemsize=2) > memory
    assert fit_bytes(sizes, itemsize=4, source_itemsize=2, curved=False) <= memory


def test_memory_covers_every_tensor_of_a_fit() -> None:
    """Beside a slow count: what Python can see alive after each step, temporaries of kernels not included."""
    import gc

    sizes = Sizes(24, 60, 84, 6, 30)
    config = to_config(composed("train.steps=4", "train.patience=0"))
    most = 0

    def count(record: object) -> None:
        nonlocal most
        gc.collect()
        storages = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
            for one in gc.get_objects()
            if type(one) is torch.Tensor and one.numel() > 1000
        }
        most = max(most, sum(storages.values()))

    gc.collect()
    X = torch.randn(24, 60, 84, generator=torch.Generator().manual_seed(0))
    fit_bank(X, sizes, fit_options(config), generator=torch.Generator().manual_seed(0), on_step=count)
    predicted = fit_bytes(sizes, itemsize=4, source_itemsize=4)
    assert 0.3 * predicted < most < 1.2 * predicted


@pytest.mark.slow
def test_the_bench_runs_and_memory_is_near() -> None:
    """Time is only printed: a shared machine may be at anything."""
    bench = Path(__file__).parents[2] / "experiments" / "bench" / "dry_run.py"
    command = [sys.executable, str(bench), "--shapes", "12x88x128", "--tolerance", "99"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| 12 x")]
    assert 0.75 < float(row.split("|")[4]) < 1.25, json.dumps(row)


def test_a_metric_is_counted(tmp_path: Path) -> None:
    """Held: one d x d root of an expert for up and gate, and weights of the rows. A step has more to multiply."""
    text = ("calibrate.text=embedded", f"calibrate.out={tmp_path}")
    checkpoint = open_checkpoint(None)
    common = ("layer=3", "bank.m=4", "bank.r=22", "bank.activation=tanh")

    def predicted(*options: str) -> tuple[float, int, int]:
        config = to_config(composed(*common, *options))
        bank = plan(config, checkpoint)[0]
        return (
            average_work(config, bank.sizes),
            metric_numbers(config, bank),
            bytes_of(config, checkpoint, bank),
        )

    n, p, d = EMBEDDED.n, EMBEDDED.p, EMBEDDED.d
    plain, experts, inputs = predicted(), predicted("normalise.metric=experts"), predicted(*text)
    assert (plain[1], experts[1], inputs[1]) == (0, 2 * d * d, n * d * d + n * p)
    assert predicted("family=both", "bank.scope=families", *text)[1] == n * d * d + 2 * n * p
    assert predicted("family=down", *text)[1] == n * p * p
    assert plain[0] < inputs[0] < 3 * plain[0]
    assert experts[0] == inputs[0]
    assert predicted("normalise.metric=experts", "bank.activation=identity")[0] == plain[0]
    assert inputs[2] >= plain[2] + 4 * n * d * d
