"""Names of runs side by side."""

from __future__ import annotations

from globe.runs.comparison import short_names


def test_runs_are_called_by_what_they_differ_in() -> None:
    names = ["embedded_up_L12_m2_r5_aaaaaaaa", "embedded_up_L12_m4_r5_bbbbbbbb"]
    assert short_names(names) == {names[0]: "m2", names[1]: "m4"}


def test_runs_that_would_be_called_alike_keep_their_names() -> None:
    names = ["embedded_up_m2_aaaaaaaa", "embedded_up_m2_bbbbbbbb", "embedded_up_m4_cccccccc", "mine"]
    short = short_names(names)
    assert short["mine"] == "mine"
    assert short[names[0]] == names[0]
    assert short[names[1]] == names[1]
    assert len(set(short.values())) == 4
