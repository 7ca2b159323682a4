"""Coded adapters: the coder beside its definition, files that were damaged, and what coding gains."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from globe.bank.coded import Coded, read_coded
from globe.bank.entropy import CLASSES, decode, encode, states_of, tables
from globe.bank.feedback import metric_errors, round_with_feedback
from globe.bank.file import read_artefact
from globe.bank.gauge import share_bits
from globe.bank.packing import Packed
from globe.bank.rounding import LARGEST, StepGrid, round_nearest
from globe.bank.steps import choose_steps, coded_bits
from globe.config.composition import to_config
from globe.errors import ArtefactError, ConfigError
from run_support import composed, run_in

N, P, K = 3, 14, 22
ZERO = 127


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(n: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Integers of random classes, within their reach: half of the matrices have none of cut bits."""
    draw = np.random.default_rng(seed)
    most = np.array([26, CLASSES])[np.arange(n) % 2, None]
    classes = (draw.random((n, count)) * most).astype(np.uint8)
    wide = np.rint(draw.normal(size=(n, count)) * np.sqrt(2.0 ** (classes / 2 - 6)))
    reach = tables().reach[classes]
    return wide.clip(-reach, reach).astype(np.int16), classes


def coded(seed: int = 0) -> tuple[Coded, Tensor]:
    """Adapters whose rows and columns differ, coded and as integers."""
    A = normal(N, P, K, seed=seed) * torch.logspace(0, 1.5, K) * torch.logspace(0, 1, P)[:, None]
    grid = StepGrid(
        K, torch.randint(0, 5, (N, P), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    )
    rounded = round_nearest(A / 3, grid)
    return Coded.of(rounded, torch.full((K,), 3.0)), rounded.codes


def inside(low: float, high: float, variance: float) -> float:
    return (math.erf(high / math.sqrt(2 * variance)) - math.erf(low / math.sqrt(2 * variance))) / 2


def test_frequencies_are_those_of_two_rounded_normal_numbers() -> None:
    table = tables()
    assert (table.frequency.sum(axis=1) == 1 << 15).all()
    for z in (8, 13, 20):
        variance = 2.0 ** (z / 2 - 6)
        for q in range(3):
            wanted = 0.8 * inside(q - 0.5, q + 0.5, 0.7 * variance)
            wanted += 0.2 * inside(q - 0.5, q + 0.5, 2.2 * variance)
            assert table.frequency[z, ZERO + q] / (1 << 15) == pytest.approx(wanted, rel=0.02, abs=1e-3)
    assert (np.diff(table.reach) >= 0).all()
    assert int(table.reach[-1]) >= LARGEST
    assert int(table.cut[27]) == 0
    assert int(table.cut[-1]) == 7
    # numbers that are in files: they must be the same everywhere and for ever
    assert table.frequency[12, ZERO : ZERO + 4].tolist() == [13532, 7637, 1637, 277]


@pytest.mark.parametrize(("n", "count"), [(1, 1), (3, 7), (5, 8195), (2, 12301)])
def test_what_was_coded_comes_back(n: int, count: int) -> None:
    codes, classes = integers(n, count)
    stream, ends = encode(codes, classes)
    assert (decode(stream, ends, classes) == codes).all()
    ideal = tables().length[classes, np.abs(codes)].sum() / 8
    assert ideal <= len(stream) <= 1.002 * ideal + n * (4 * states_of(count) + 2)


def test_a_state_is_what_the_definition_makes_of_it() -> None:
    codes, classes = (
        np.concatenate(one, axis=1) for one in zip(*(integers(2, 50), integers(2, 50, 1)), strict=True)
    )
    codes, classes = codes[1:], classes[1:]
    state, words = 1 << 16, []
    for q, z in zip(codes[0][::-1].tolist(), classes[0][::-1].tolist(), strict=True):
        cut = max(0, (z - 24) // 4)
        above, rest = divmod(q + (1 << cut >> 1), 1 << cut)
        table = tables().frequency[z - 4 * cut]
        pairs = [(int(table[ZERO + above]), int(table[: ZERO + above].sum()))]
        if cut:
            pairs.insert(0, (1 << (15 - cut), rest << (15 - cut)))
        for f, below in pairs:
            if state >= f << 17:
                words.append(state & 0xFFFF)
                state >>= 16
            state = ((state // f) << 15) + state % f + below
    assert int(classes.max()) > 40
    wanted = np.concatenate(
        [np.array([state], "<u4").view(np.uint8), np.array(words[::-1], "<u2").view(np.uint8)]
    )
    assert encode(codes, classes)[0].tolist() == wanted.tolist()


def test_damaged_streams_are_refused() -> None:
    codes, classes = (one[::2] for one in integers(3, 900))  # bits that were cut off could be any
    stream, ends = encode(codes, classes)
    for at in range(0, len(stream), 97):
        bad = stream.copy()
        bad[at] ^= 16
        with pytest.raises(ValueError, match="damaged"):
            decode(bad, ends, classes)
    with pytest.raises(ValueError, match="length"):
        decode(stream[:-2], ends, classes)
    with pytest.raises(ValueError, match="length"):
        decode(stream, ends - np.array([1, 0]), classes)


def test_coded_adapters_are_the_integers_times_steps_and_columns() -> None:
    one, codes = coded()
    steps = torch.tensor(
        [
            [2.0 ** (int(e + own[0]) / 2) for e in row]
            for row, own in zip(one.rows >> 4, one.experts, strict=True)
        ]
    )
    wanted = (codes.float() - LARGEST) * steps.bfloat16().float()[..., None] * 3.0
    torch.testing.assert_close(one.values(), wanted, rtol=4e-3, atol=0)
    assert torch.equal(one.rounded().codes, codes)
    assert torch.equal(one[[2, 0]].values(), one.values()[[2, 0]])
    assert torch.equal(one[1:2].values(), one.values()[1:2])
    assert one[:0].values().shape == (0, P, K)
    assert one.nbytes == one.words.numel() + 6 * N + N * P + K + 2 * K


def test_integers_that_spread_by_rows_and_columns_take_the_bits_of_their_entropy() -> None:
    rows, columns = torch.logspace(-0.5, 0.5, 40), torch.logspace(-1, 1, 60)
    spread = rows[:, None] * columns
    A = normal(5, 40, 60) * spread
    sizes = (rows.square().expand(5, 40), columns.square())
    one = Coded.of(
        round_nearest(A, StepGrid(60, torch.zeros(5, 40, dtype=torch.uint8), sizes)), torch.ones(60)
    )
    ideal = 5 * float(coded_bits(spread.square()).sum())
    assert 8 * one.words.numel() < 1.06 * ideal


def broken(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    own = dict(tensors)
    match name:
        case "none":
            del own["spread"]
        case "ends":
            own["ends"] = own["ends"].flip(0)
        case "short":
            own["words"] = own["words"][:-1]
        case "spread":
            own["spread"] = torch.full_like(own["spread"], CLASSES + 24)
        case "columns":
            own["columns"] = own["columns"] * math.nan
        case "experts":
            own["experts"] = own["experts"][:, :1]
        case "exponents":
            own["experts"] = torch.full_like(own["experts"], 200)
        case "rows":
            own["rows"] = own["rows"][:, :0]
        case "dtype":
            own["ends"] = own["ends"].long()
    return own


@pytest.mark.parametrize(
    "name", ["none", "ends", "short", "spread", "columns", "experts", "exponents", "rows", "dtype"]
)
def test_hostile_tensors_are_refused(name: str) -> None:
    one, _ = coded()
    assert torch.equal(read_coded(one.tensors(), one.layout(), "it").values(), one.values())
    with pytest.raises(ArtefactError, match="it can't be used: it has"):
        read_coded(broken(name, one.tensors()), one.layout(), "it")
    for width in (K + 1, True, None, 1 << 21):
        with pytest.raises(ArtefactError, match="it can't be used"):
            read_coded(one.tensors(), {"coded": width}, "it")


def test_a_damaged_stream_is_refused_when_it_is_read() -> None:
    one, _ = coded()
    one.words[len(one.words) // 2] ^= 4
    with pytest.raises(ArtefactError, match="damaged stream"):
        one.values()


def test_steps_take_the_bits_there_are_and_errors_weigh_alike() -> None:
    A = normal(4, 30, 50) * torch.logspace(-1, 1, 50)
    rows, weights = torch.logspace(0, 3, 120).view(4, 30), torch.logspace(1, -1, 50)
    grid, columns = choose_steps(A, rows, weights, 2.0 * A.numel())
    one = Coded.of(round_nearest(A / columns, grid), columns)
    assert 8 * one.words.numel() == pytest.approx(2.0 * A.numel() + 32 * 4, rel=0.1)
    counted = (one.values() - A).square() * weights
    busy, idle = counted[3].mean(), counted[0].mean()
    assert 0.3 < busy * rows[3].mean() / (idle * rows[0].mean()) < 3
    none = choose_steps(A, torch.zeros(4, 30), weights, 2.0 * A.numel())[0]
    assert int(none.exponents.max()) == 0


def test_coding_leaves_a_smaller_error_than_bits_set_apart() -> None:
    A, H = normal(4, 30, 40), torch.diag(torch.logspace(1, -1, 40)).expand(4, 40, 40)
    rows, columns = torch.logspace(0, 2, 120).view(4, 30), H[0].diagonal()
    weights = rows[..., None]

    def error(values: Tensor) -> float:
        return float((metric_errors(A, values, H)[..., None] * weights).sum())

    levels = share_bits(rows, columns, 2 * A.numel())
    assert levels is not None
    packed = Packed.of(round_with_feedback(A, H, levels))
    grid, factors = choose_steps(A, rows, columns, 8 * packed.words.numel() * 0.88)
    scaled = round_with_feedback(A / factors, H * factors[:, None] * factors, grid)
    found = Coded.of(scaled, factors)
    assert found.words.numel() <= packed.words.numel()
    assert found.nbytes < packed.nbytes
    assert error(found.values()) < 0.75 * error(packed.values())


def test_a_run_of_coded_adapters_keeps_to_its_bytes_and_is_read_back(tmp_path: Path) -> None:
    given = ("bank.m=1", "bank.r=d", "bank.activation=identity", "train.steps=2", "bank.coded=true")
    folders = [run_in(tmp_path, *given[: 4 + c], "bank.size=0.2", "layer=12")[1] for c in (0, 1)]
    banks = [read_artefact(folder / "banks" / "layer012.up") for folder in folders]
    for bank in banks:
        assert 0.97 * 0.2 * 2 * bank.family_parameters <= bank.nbytes <= 0.2 * 2 * bank.family_parameters
    one = banks[1].packed["adapters"]
    assert isinstance(one, Coded)
    assert torch.equal(one.values(banks[1].codes.dtype), banks[1].adapters)
    errors = [
        bank.metrics["metrics"]["relfrob"]
        if "relfrob" in bank.metrics["metrics"]
        else bank.metrics["relfrob"]
        for bank in banks
        if bank.metrics
    ]
    assert errors[1] < 0.9 * errors[0]
    file = folders[1] / "banks" / "layer012.up" / "bank.safetensors"
    held = sum(tensor.nbytes for name, tensor in load_file(file).items() if name.startswith("adapters"))
    assert held == one.nbytes


def test_coding_needs_bits_and_no_groups() -> None:
    with pytest.raises(ConfigError, match=r"bank.coded=True is not possible: give false, or bank.bits"):
        to_config(composed("bank.coded=true"))
    with pytest.raises(ConfigError, match=r"bank.group_A=16 is not possible: give null with bank.coded"):
        to_config(composed("bank.coded=true", "bank.bits=3", "bank.group_A=16"))


def test_a_column_of_large_numbers_does_not_coarsen_its_rows() -> None:
    A = normal(4, 30, 50) * torch.cat([torch.tensor([3000.0]), torch.ones(49)])
    grid, columns = choose_steps(A, torch.ones(4, 30), torch.ones(50), 2.0 * A.numel())
    one = Coded.of(round_nearest(A / columns, grid), columns)
    assert 8 * one.words.numel() == pytest.approx(2.0 * A.numel() + 32 * 4, rel=0.1)
    assert float((grid.exponents > 0).float().mean()) < 0.1
    assert float((one.values() - A)[..., 1:].square().mean()) < 0.15
