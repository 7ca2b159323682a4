"""Whether an artefact or an unfinished fit is still what a run would learn."""

from __future__ import annotations

from pathlib import Path

import pytest

from globe.bank.file import read_artefact
from globe.checkpoint import open_checkpoint
from globe.config.composition import to_config
from globe.fit.plan import BankSize, outline, plan_bank
from globe.fit.provenance import complete_artefact, fit_fingerprint, source_of
from run_support import composed, run_in


@pytest.mark.parametrize(
    "chosen", [("bank.size=0.2",), ("bank.bits_A=3", "bank.bits_B=8")], ids=["by a budget", "typed"]
)
def test_bits_that_a_budget_chose_are_part_of_what_a_bank_is(tmp_path: Path, chosen: tuple[str, ...]) -> None:
    given = ("bank.m=1", "bank.r=d", "bank.activation=identity", *chosen, "train.steps=1", "layer=12")
    config = to_config(composed(*given))
    checkpoint = open_checkpoint(None)
    (one,) = outline(config, checkpoint)
    sizes = {"m": 1, "r": one.shape[2], "atom_rank": None}
    few, more = (
        plan_bank(config, one, BankSize(**sizes, bits_A=bits, bits_B=8) if "size" in chosen[0] else None)
        for bits in (2.5, 3.0)
    )
    sources = [source_of(config, checkpoint, bank) for bank in (few, more)]
    marks = {
        fit_fingerprint(config, bank, source, "cpu")
        for bank, source in zip((few, more), sources, strict=True)
    }
    assert len(marks) == (2 if "size" in chosen[0] else 1)

    _, folder = run_in(tmp_path, *given)
    bank = folder / "banks" / "layer012.up"

    def whole(precision: object) -> bool:
        source = source_of(config, checkpoint, more) | ({} if precision is None else {"precision": precision})
        return complete_artefact(bank, config, checkpoint, more, source) is not None

    stored = (read_artefact(bank).source or {}).get("precision")
    assert (stored is not None) == ("size" in chosen[0])
    assert whole(stored)
    assert not whole({"adapters": 7.5, "atoms": 8})
