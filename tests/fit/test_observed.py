"""The metric from statistics of a calibration text: beside the slow formula of the error it stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from globe.bank.file import read_artefact
from globe.calibration.run import Calibration
from globe.calibration.statistics import EVEN, LayerStatistics, OutputWeights, SecondMoments
from globe.config.choices import Metric
from globe.config.composition import plain, to_config
from globe.config.identity import run_name
from globe.config.schema import chosen_metric
from globe.errors import ConfigError
from globe.fit.observed import FLOOR, LEAST, Observed, inputs_metric
from globe.numerics.group import ProcessGroup
from globe.numerics.input_metric import InputMetric
from globe.numerics.metric import metric_of_roots, root_of
from run_support import bytes_of, composed, load, run_in

N, P, D = 5, 7, 9


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(n: int, q: int, seed: int) -> SecondMoments:
    rows = draw(n, 3 * q, q, seed=seed) * torch.logspace(0, -1, q, dtype=torch.float64)
    rows = rows * (1 + torch.arange(n).double())[:, None, None]
    return SecondMoments(matrix=(rows.mT @ rows / rows.shape[1]).float())


def statistics(*, uneven: bool = True, layer: int = 3, output: bool = False) -> LayerStatistics:
    counts = torch.tensor([40.0, 3.0, 0.0, 700.0, 90.0]).double()
    one = LayerStatistics(
        layer=layer,
        inputs=moments(N, D, 1 + layer),
        inner=moments(N, P, 2 + layer),
        counts=counts,
        gate2=counts * torch.tensor([0.1, 0.3, 0.2, 0.05, 0.2]).double(),
        rows_up=draw(N, P, seed=3).abs().float() + 0.1,
        rows_gate=draw(N, P, seed=4).abs().float() + 0.1,
        reap=counts,
    )
    if output:
        F = moments(1, D, 11 + layer).dense()[0] * 3e-4
        one = replace(one, output=OutputWeights(F, draw(N, P, seed=12).square().float() * 2e-3))
    if uneven:
        return one
    same, even = torch.ones(N).double(), torch.ones(N, P)
    eye = (
        SecondMoments(matrix=torch.eye(D).expand(N, D, D)),
        SecondMoments(matrix=torch.eye(P).expand(N, P, P)),
    )
    return replace(
        one, inputs=eye[0], inner=eye[1], counts=60 * same, gate2=7 * same, rows_up=even, rows_gate=even
    )


def slow_errors(s: LayerStatistics, family: str, E: Tensor) -> Tensor:
    """The weighted squared error of every expert, entry by entry of the formula, up to one factor for all."""
    moment = s.inner if family == "down" else s.inputs
    q = moment.q
    dense = moment.dense().double()
    mean = torch.zeros(q, q, dtype=torch.float64)
    for i in range(N):
        mean += s.gate2[i] * dense[i] / s.gate2.sum()
    rows = {"up": s.rows_up, "gate": s.rows_gate, "down": torch.ones(N, 1)}[family]
    assert rows is not None
    F = torch.eye(D, dtype=torch.float64)
    if s.output is not None:
        even = s.output.F.double().trace() / D
        F = s.output.F.double() / even + EVEN * F
        if family != "down":
            rows = rows.double() * (s.output.down / even + EVEN)
    total = torch.stack([rows[i].double() * s.gate2[i] * dense[i].trace() for i in range(N)])
    average = total.sum() / (s.counts.sum() * total.shape[1])
    weights = torch.stack([(total[i] + q * average) / (s.counts[i] + q) * s.counts[i] for i in range(N)])
    weights = (weights / weights.mean() + LEAST) / (1 + LEAST)
    found = []
    for i in range(N):
        C = (s.counts[i] * dense[i] + q * mean) / (s.counts[i] + q)
        C = C / (C.trace() / q) + FLOOR * torch.eye(q, dtype=torch.float64)
        if family == "down":
            found.append(weights[i, 0] * (E[i].T @ C @ E[i] @ F).trace())
        else:
            found.append((weights[i] * (E[i] @ C @ E[i].T).diagonal()).sum())
    return torch.stack(found)


def observed(s: LayerStatistics, family: str) -> Observed:
    return Observed(s, family, tuple(range(N)))


def wanted_norms(s: LayerStatistics, family: str, X: Tensor, E: Tensor) -> Tensor:
    return slow_errors(s, family, E) * float(X.square().sum() / slow_errors(s, family, X).sum())


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("family", ["up", "gate", "down"])
def test_norms_are_the_weighted_errors(family: str, output: bool) -> None:
    s, X, E = statistics(output=output), draw(N, P, D, seed=5), draw(N, P, D, seed=6)
    metric = inputs_metric([observed(s, family)], X)
    assert metric is not None
    torch.testing.assert_close(metric.norms(E), wanted_norms(s, family, X, E), rtol=1e-6, atol=0)
    assert float(metric.norms(X).sum()) == pytest.approx(float(X.square().sum()))
    changed = X.clone()
    metric.enter(changed)
    assert float(changed.square().sum()) == pytest.approx(float(X.square().sum()))
    metric.leave(changed)
    torch.testing.assert_close(changed, X, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["up", "down"])
@pytest.mark.parametrize("scale", ["expert", "row"])
def test_an_error_counts_as_that_of_the_expert_itself(scale: str, family: str) -> None:
    """Whatever each was divided by: the ratio of two errors is that of the experts as they are."""
    s, W, E = statistics(), draw(N, P, D, seed=5), draw(N, P, D, seed=6)
    divided = 0.2 + draw(N, P, seed=7).abs() if scale == "row" else 0.2 + draw(N, seed=7).abs()
    own = divided.reshape(N, -1, 1)
    metric = inputs_metric([observed(s, family)], W / own, divided)
    assert metric is not None
    found = metric.norms(E / own)
    wanted = slow_errors(s, family, E)
    torch.testing.assert_close(found / found.sum(), wanted / wanted.sum(), rtol=1e-6, atol=0)


def test_equal_inputs_and_uses_are_no_metric() -> None:
    s, X = statistics(uneven=False), draw(N, P, D, seed=5)
    assert inputs_metric([observed(s, "up")], X) is None
    assert inputs_metric([observed(s, "up"), observed(s, "gate")], torch.cat([X, X])) is None


def test_members_keep_their_energies_and_share_their_roots() -> None:
    s, other = statistics(), statistics(layer=8)
    X = draw(3 * N, P, D, seed=5)
    X[N : 2 * N] *= 5
    E = draw(3 * N, P, D, seed=6)
    members = [observed(s, "up"), observed(s, "gate"), observed(other, "up")]
    metric = inputs_metric(members, X)
    assert metric is not None
    assert metric.columns is not None
    assert len(metric.columns.roots) == 2 * N
    for at, (one, family) in enumerate([(s, "up"), (s, "gate"), (other, "up")]):
        here = slice(at * N, (at + 1) * N)
        torch.testing.assert_close(
            metric.norms(E)[here], wanted_norms(one, family, X[here], E[here]), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("output", [False, True])
def test_down_beside_up_in_one_bank(output: bool) -> None:
    s, other = (statistics(layer=layer, output=output) for layer in (3, 8))
    X, E = draw(3 * N, P, D, seed=5), draw(3 * N, P, D, seed=6)
    members = [(s, "up"), (s, "down"), (other, "down")]
    metric = inputs_metric([observed(*one) for one in members], X)
    assert metric is not None
    for at, (one, family) in enumerate(members):
        here = slice(at * N, (at + 1) * N)
        torch.testing.assert_close(
            metric.norms(E)[here], wanted_norms(one, family, X[here], E[here]), rtol=1e-6, atol=1e-9
        )


def test_some_of_the_experts_and_the_shared_one() -> None:
    """Which are chosen changes no weight of an expert beside another's; the shared one is an average one."""
    s, X = statistics(), draw(3, P, D, seed=5)
    E = draw(3, P, D, seed=6)
    metric = inputs_metric([Observed(s, "up", (4, 1, -1))], X)
    assert metric is not None
    padded = torch.zeros(N, P, D, dtype=torch.float64)
    padded[4], padded[1] = E[0], E[1]
    slow = slow_errors(s, "up", padded)
    found = metric.norms(E)
    assert float(found[0] / found[1]) == pytest.approx(float(slow[4] / slow[1]), rel=1e-6)
    assert bool(torch.isfinite(found).all())
    assert float(found[2]) > 0


class Part(ProcessGroup):
    """One of two processes, which hears nothing from the other one."""

    def _add(self, tensor: Tensor) -> None:
        pass

    def _send(self, tensor: Tensor, source: int) -> None:
        pass


def test_a_process_makes_the_metric_of_its_own_experts() -> None:
    s, X, E = statistics(), draw(2 * N, P, D, seed=5), draw(2 * N, P, D, seed=6)
    members = [observed(s, "up"), observed(s, "gate")]
    whole = inputs_metric(members, X)
    assert whole is not None
    assert whole.columns is not None
    for rank, rows in enumerate((slice(0, 7), slice(7, 2 * N))):
        part = inputs_metric(members, X[rows], group=Part(rank, (0, 7, 2 * N)))
        assert part is not None
        assert part.columns is not None
        for at in range(rows.stop - rows.start):
            mine, theirs = slice(at, at + 1), slice(rows.start + at, rows.start + at + 1)
            torch.testing.assert_close(part.columns.of(mine), whole.columns.of(theirs))
        one, other = part.norms(E[rows]), whole.norms(E)[rows]
        # energies are added up over the processes, which these two do not do: one factor for each member
        for member in (slice(0, N), slice(N, 2 * N)):
            inside = [at for at in range(rows.start, rows.stop) if member.start <= at < member.stop]
            if not inside:
                continue
            ratio = torch.stack([one[at - rows.start] / other[at - rows.start] for at in inside])
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-9, atol=0)


@pytest.mark.parametrize("family", ["up", "down"])
def test_a_block_is_the_metric_of_what_is_left_of_an_error(family: str) -> None:
    """An error outside of the block is none: norms of the block are those of the error padded with zeros."""
    s, X = statistics(), draw(N, P, D, seed=5)
    metric = inputs_metric([observed(s, family)], X)
    assert metric is not None
    columns = torch.tensor([7, 0, 3, 4])
    rows = torch.stack([torch.randperm(P, generator=torch.Generator().manual_seed(i))[:3] for i in range(N)])
    E = draw(N, 3, 4, seed=8)
    padded = torch.zeros(N, P, D, dtype=torch.float64)
    for i in range(N):
        for a, row in enumerate(rows[i]):
            padded[i, row, columns] = E[i, a]
    torch.testing.assert_close(metric.block(rows, columns).norms(E), metric.norms(padded), rtol=1e-9, atol=0)


def test_adapters_and_gradients_go_back_through_the_rows() -> None:
    for rows in (0.5 + draw(N, P, seed=1).abs(), root_of(moments(N, P, 5).dense().double()).mT.contiguous()):
        columns = metric_of_roots(root_of(moments(N, D, 6).dense().double()))
        metric, every = InputMetric(columns, rows), slice(0, N)
        A, E = draw(N, P, 3, seed=2), draw(N, P, D, seed=3).requires_grad_()
        torch.testing.assert_close(metric.adapters(metric.weighted(A, every), every), A)
        F = draw(N, P, D, seed=4)
        (gradient,) = torch.autograd.grad((metric.seen(E, every) * F).sum(), E)
        torch.testing.assert_close(metric.adjoint_weighted(F, every), gradient)


# --- runs ----------------------------------------------------------------------------------------------------------

SMALL = ("model.max_experts=7", "layer=5", "bank.m=3", "bank.r=11", "train.steps=8", "export_dtype=float32")
TEXT = ("calibrate.text=embedded", "calibrate.tokens=1024", "calibrate.window=128")


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The options of a text whose statistics are taken once for all tests here."""
    return (*TEXT, f"calibrate.out={tmp_path_factory.mktemp('statistics')}")


@pytest.mark.parametrize(
    "options",
    [
        ("bank.activation=tanh",),
        ("bank.activation=identity", "bank.atom_rank=6"),
        ("family=down", "bank.activation=tanh"),
        ("method=svd", "family=down"),
        ("method=shared_basis",),
        ("method=mean_svd", "family=down"),
        ("method=group_svd", "family=down"),
        ("method=mobe_corrected", "family=down", "bank.activation=tanh", "train.steps=150"),
        ("method=slbf", "family=down", "bank.activation=tanh", "train.steps=300"),
    ],
)
def test_a_run_with_a_text_gains_in_the_metric_what_it_pays_in_relfrob(
    tmp_path: Path, with_text: tuple[str, ...], options: tuple[str, ...]
) -> None:
    plain_figure, _ = run_in(tmp_path, *SMALL, *options)
    figure, folder = run_in(tmp_path, *SMALL, *options, *with_text)
    assert chosen_metric(to_config(composed(*with_text))) is Metric.inputs
    (bank,) = load(folder / "summary.json")["banks"]
    assert 0 < bank["metrics"]["relfrob_metric"] < 0.9 * plain_figure
    assert figure > plain_figure
    source = read_artefact(folder / "banks" / bank["key"]).source
    assert source is not None
    assert len(source["calibration"]) == 64


def test_equal_statistics_leave_a_float64_fit_bit_for_bit(
    tmp_path: Path, with_text: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C = I, and every expert and row used alike."""
    options = (*SMALL, "dtype=float64", "bank.activation=tanh", "train.steps=4")
    _, without = run_in(tmp_path / "without", *options)
    _, real = run_in(tmp_path / "real", *options, *with_text)
    layer = Calibration.layer

    def equal(self: Calibration, at: int) -> LayerStatistics:
        s = layer(self, at)
        n, p, d = s.inputs.n, s.inner.q, s.inputs.q
        return replace(
            s,
            inputs=SecondMoments(matrix=torch.eye(d).expand(n, d, d)),
            counts=torch.full((n,), 50.0).double(),
            gate2=torch.full((n,), 3.0).double(),
            rows_up=torch.full((n, p), 0.3),
            output=None,
        )

    monkeypatch.setattr(Calibration, "layer", equal)
    _, folder = run_in(tmp_path / "equal", *options, *with_text)
    wanted, found, other = (read_artefact(one / "banks" / "layer005.up") for one in (without, folder, real))
    for part in ("bank", "codes", "adapters"):
        assert torch.equal(getattr(found, part), getattr(wanted, part))
        assert not torch.equal(getattr(other, part), getattr(wanted, part))


def test_the_table_of_a_run_shows_the_error_in_the_metric_beside_the_plain_one(
    tmp_path: Path, with_text: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("model.max_experts=7", "layer=5", "family=both", "bank.m=3", "bank.r=11", "train.steps=2")
    run_in(tmp_path, *options)
    assert "in the" not in capsys.readouterr().out
    _, folder = run_in(tmp_path, *options, *with_text)
    shown = capsys.readouterr().out
    banks = load(folder / "summary.json")["banks"]
    assert "in the" in shown
    errors = [bank["metrics"]["relfrob_metric"] for bank in banks]
    for one in (*errors, sum(errors) / 2):
        assert f"{one:.4f}" in shown


def test_a_finished_run_is_taken_and_another_text_makes_another(tmp_path: Path) -> None:
    options = (*SMALL, "train.steps=2")
    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the word, and it is said of old. " * 80)
    given = (f"calibrate.text={text}", "calibrate.tokens=512", "calibrate.window=64", f"output={tmp_path}")
    _, folder = run_in(tmp_path / "runs", *options, *given)
    before = (folder / "banks" / "layer005.up" / "bank.safetensors").stat().st_mtime_ns
    run_in(tmp_path / "runs", *options, *given)
    assert (folder / "banks" / "layer005.up" / "bank.safetensors").stat().st_mtime_ns == before
    first = bytes_of(folder, "layer005.up")
    text.write_text("Quite another one, of ships and of whales and the sea they swim in! " * 80)
    run_in(tmp_path / "runs", *options, *given, "overwrite=true")
    assert bytes_of(folder, "layer005.up") != first


def test_the_search_fits_candidates_in_the_metric(tmp_path: Path, with_text: tuple[str, ...]) -> None:
    """Few dense atoms are among them; the errors are those in the metric."""
    options = ("model.max_experts=7", "layer=5", "bank.kept=0.6", "budget.seconds=0.5", "train.steps=3")
    _, folder = run_in(tmp_path, *options, *with_text)
    (first, *_) = next(iter(load(folder / "frontier.json")["shapes"].values()))["frontier"]["rounds"]
    assert {1, 2, 4} <= {
        probe["size"]["m"] for probe in first["probes"] if probe["size"]["atom_rank"] is None
    }
    assert max(probe["relfrob"] for probe in first["probes"]) < 0.4
    _, plain_run = run_in(tmp_path, *options)
    (first, *_) = next(iter(load(plain_run / "frontier.json")["shapes"].values()))["frontier"]["rounds"]
    assert min(probe["relfrob"] for probe in first["probes"]) > 0.2


def test_options_that_contradict_each_other_are_refused() -> None:
    for options, words in (
        (("normalise.metric=inputs",), r"needs a text: give calibrate\.text"),
        (("calibrate.text=embedded", "normalise.store=checkpoint"), r"normalise\.store='checkpoint'"),
    ):
        with pytest.raises(ConfigError, match=words):
            to_config(composed(*options))


def test_without_a_text_a_run_has_the_name_it_had() -> None:
    """Statistics that no metric asks for are no part of a run."""
    name = run_name(plain(composed()))
    assert run_name(plain(composed("normalise.metric=none"))) == name
    assert run_name(plain(composed("calibrate.tokens=512"))) == name
    assert run_name(plain(composed("normalise.metric=none", "calibrate.text=embedded"))) == name
    assert run_name(plain(composed("calibrate.text=embedded"))) != name
    given = run_name(plain(composed("calibrate.text=embedded", "normalise.metric=inputs")))
    assert run_name(plain(composed("calibrate.text=embedded"))) == given


def test_a_text_that_no_metric_asks_for_is_not_read(tmp_path: Path) -> None:
    given = (
        *TEXT,
        f"calibrate.out={tmp_path / 'statistics'}",
        "normalise.metric=none",
        "layer=12",
        "bank.m=2",
        "bank.r=8",
        "train.steps=1",
    )
    run_in(tmp_path / "run", *given)
    assert not (tmp_path / "statistics").exists()
