"""Texts as tokens with their bytes, and the windows they are cut into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evaluation_support import TEXT
from hypothesis import given
from hypothesis import strategies as st

from globe.calibration.text import Tokens, tokenise
from globe.errors import ConfigError
from globe.evaluation.text import Window, batches, read_text, sliding_windows


def byte_tokens(folder: Path, text: str, **options: int) -> Tokens:
    from transformers import AutoTokenizer

    return tokenise(text, AutoTokenizer.from_pretrained(str(folder)), **options)


@given(data=st.data(), window=st.integers(2, 20), more=st.integers(0, 60))
def test_every_token_but_the_first_is_counted_once_with_enough_before_it(
    data: st.DataObject, window: int, more: int
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    tokens = window + more
    counted: list[int] = []
    for start, stop, scored in sliding_windows(tokens, window=window, stride=stride):
        assert 0 < scored < stop - start <= window
        targets = list(range(stop - scored, stop))
        if start:
            assert targets[0] - start >= window - stride
        counted += targets
    assert counted == list(range(1, tokens))


def test_windows_without_overlap_leave_out_the_first_token_of_each() -> None:
    windows = sliding_windows(23, window=6, stride=6)
    assert windows == (Window(0, 6, 5), Window(6, 12, 5), Window(12, 18, 5), Window(18, 23, 4))
    # a last window of a single token has nothing to count
    assert sliding_windows(13, window=6, stride=6)[-1] == Window(6, 12, 5)


def test_windows_of_one_length_go_together_in_order() -> None:
    windows = sliding_windows(31, window=8, stride=4)
    groups = batches(windows, 4)
    assert [one for group in groups for one in group] == list(windows)
    assert [len(group) for group in groups] == [4, 2, 1]
    assert all(len({one.stop - one.start for one in group}) == 1 for group in groups)


@pytest.mark.parametrize(
    ("tokens", "window", "stride", "sentence"),
    [
        (7, 8, 4, "the text has 7 tokens, fewer than window=8"),
        (9, 8, 0, "stride=0"),
        (9, 8, 9, "stride=9"),
        (9, 1, 1, "window=1"),
    ],
)
def test_impossible_windows_are_refused(tokens: int, window: int, stride: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        sliding_windows(tokens, window=window, stride=stride)


def test_the_bytes_of_the_tokens_are_those_of_the_text(checkpoint_of: Callable[..., Path]) -> None:
    tokens = byte_tokens(checkpoint_of(), TEXT)
    assert int(tokens.bytes.sum()) == len(TEXT.encode())
    assert tokens.ids.shape[0] == len(TEXT.encode())  # this tokenizer has a token for each byte
    # é is two tokens: its two bytes count for the first of them
    (accent,) = (index for index, byte in enumerate("café".encode()) if byte == 0xC3)
    first = TEXT.encode().index("café".encode()) + accent
    assert tokens.bytes[first - 1 : first + 3].tolist() == [1, 2, 0, 1]


def test_fewer_tokens_keep_the_bytes_of_those_that_stay(checkpoint_of: Callable[..., Path]) -> None:
    whole, some = (byte_tokens(checkpoint_of(), TEXT, **one) for one in ({}, {"max_tokens": 41}))
    assert torch.equal(some.ids, whole.ids[:41])
    assert torch.equal(some.bytes, whole.bytes[:41])


def test_real_tokens_cover_the_embedded_text() -> None:
    from transformers import AutoTokenizer

    import globe.embedded

    text = read_text("embedded").content
    tokens = tokenise(text, AutoTokenizer.from_pretrained(str(globe.embedded.path())))
    assert int(tokens.bytes.sum()) == len(text.encode())
    assert int(tokens.bytes.min()) >= 0
    assert tokens.ids.shape[0] < len(text.encode()) / 2


def test_a_tokenizer_without_offsets_gets_equal_bytes() -> None:
    def words(text: str, **options: object) -> dict[str, list[int]]:
        assert options["return_offsets_mapping"] is False
        return {"input_ids": list(range(len(text.split())))}

    tokens = tokenise("añb c d", words)
    assert tokens.ids.tolist() == [0, 1, 2]
    assert int(tokens.bytes.sum()) == len("añb c d".encode())
    assert int(tokens.bytes.max()) - int(tokens.bytes.min()) <= 1


def test_a_token_put_in_front_has_no_bytes() -> None:
    class Tokenizer:
        is_fast = True

        def __call__(self, text: str, **options: object) -> dict[str, object]:
            return {"input_ids": [9, 1, 2], "offset_mapping": [(0, 0), (0, 2), (3, 5)]}

    # the space between the words belongs to no token and counts for the second
    assert tokenise("ab cd", Tokenizer()).bytes.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "can't be read"), (b"\xff\xfe\x00", "is not UTF-8"), (b" \n", "holds no words")],
)
def test_a_text_that_is_none_is_one_sentence(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_text(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_file_is_named_by_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc")
    text = read_text(str(path))
    assert text.content == "abc"
    assert text.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
