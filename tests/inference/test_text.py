"""Streams of text: the pieces make the whole, characters are never cut, and stop strings are found
across tokens.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_ds.data import train_tokenizer
from mc_ds.data.tokenizer import Tokenizer
from mc_ds.inference.decoding.text import CONTEXT, LONGEST, Decode, TextStream

BYTES = st.lists(st.sampled_from(sorted({*"aé€😀".encode(), 0xFF, 0xC0, 0xF0, 0xED})), max_size=25)
"""Whole characters are rare among them, begun ones frequent."""


def decode(ids: Sequence[int]) -> str:
    """Ids are bytes; what is not a character becomes one mark, as in byte-level vocabularies."""
    return bytes(ids).decode("utf-8", errors="replace")


def decode_each(ids: Sequence[int]) -> str:
    """Every byte of no character becomes a mark, as in SentencePiece."""
    text, left = "", bytes(ids)
    while left:
        for size in range(1, 5):
            try:
                text, left = text + left[:size].decode(), left[size:]
                break
            except UnicodeDecodeError:
                pass
        else:
            text, left = text + "\ufffd", left[1:]
    return text


def run(
    ids: Sequence[int], stop: Sequence[str] = (), before: Sequence[int] = (), how: Decode = decode
) -> tuple[list[str], bool]:
    stream, pieces = TextStream(how, stop, before=before), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.close())
    return pieces, stream.stopped


def beyond(how: Decode, before: Sequence[int], ids: Sequence[int]) -> str:
    """What the text of all ids has that the text of those before had not."""
    text = how([*before, *ids])
    known = how(before)
    while not text.startswith(known):
        known = known[:-1]
    return text[len(known) :]


@given(st.text(max_size=30), st.text(max_size=5))
def test_pieces_make_the_text(text: str, before: str) -> None:
    pieces, stopped = run(text.encode(), before=before.encode())
    assert "".join(pieces) == text
    assert not stopped
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("how", [decode, decode_each])
@given(ids=BYTES, before=BYTES)
def test_pieces_make_the_text_of_any_bytes(how: Decode, ids: list[int], before: list[int]) -> None:
    pieces, _ = run(ids, before=before, how=how)
    assert "".join(pieces) == beyond(how, before, ids)


@pytest.mark.parametrize("how", [decode, decode_each])
@pytest.mark.parametrize("end", ["€a", "😀", "", "\ufffd"])
def test_bytes_that_never_end_are_given_out_along_the_way(how: Decode, end: str) -> None:
    ids = [0xFF] * (3 * LONGEST) + [0xE2, 0x82, 0xFF, 0xF0, 0x9F] * LONGEST
    pieces, _ = run([*ids, *end.encode()], how=how)
    assert "".join(pieces) == how([*ids, *end.encode()])
    said = 0
    for count, piece in enumerate(pieces[: len(ids)], start=1):
        said += len(piece)
        assert said >= len(how(ids[:count])) - 3


def test_the_cost_of_a_token_is_bounded() -> None:
    longest = 0

    def counted(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    run([0xFF] * 500, how=counted)
    assert longest <= LONGEST + CONTEXT + 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    files = sorted(Path(__file__).parents[2].glob("mc_ds/**/*.py"))
    return train_tokenizer([file.read_text() for file in files[:30]], 400)


@pytest.mark.parametrize("seed", range(4))
def test_a_tokenizers_pieces_make_its_text(tokenizer: Tokenizer, seed: int) -> None:
    """Random ids: mostly bytes, separators and spaces among them."""
    rng = random.Random(seed)
    euro = list(tokenizer.encode("x€😀\n"))[1:]
    for _ in range(50):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(40))]
        ids[len(ids) // 2 : len(ids) // 2] = euro[rng.randrange(3) : rng.randrange(3, 9)]
        before = ids[: rng.randrange(8)]
        pieces, _ = run(ids[len(before) :], before=before, how=tokenizer.decode)
        assert "".join(pieces) == beyond(tokenizer.decode, before, ids[len(before) :])


@given(
    st.text(alphabet="ab.", max_size=30),
    st.lists(st.text(alphabet="ab.", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, stopped = run(text.encode(), stop)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    assert stopped == bool(ends)
    if ends:
        begun = text[: ends[0]]
        assert "".join(pieces) == begun[: min(begun.find(s) for s in stop if s in begun)]
    else:
        assert "".join(pieces) == text


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    assert run(b"a\nb\n\nc", ["\n\n"])[0] == ["a", "", "\nb", "", "", ""]
    assert run("héé".encode())[0] == ["h", "", "é", "", "é", ""]


def test_bytes_that_never_become_a_character_are_given_out_in_the_end() -> None:
    stream = TextStream(decode)
    assert [stream.push(byte) for byte in (0xF0, 0x41)] == ["", "\ufffdA"]
    assert stream.push(0xE2) == ""
    assert stream.close() == "\ufffd"
