"""Streams of text: the pieces make the whole, characters are never cut, and stop strings are found
across tokens.
"""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_ds.config import ConfigError
from mc_ds.inference.decoding.text import TextStream


def decode(ids: Sequence[int]) -> str:
    """Ids are bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def run(text: str, stop: Sequence[str] = (), before: str = "") -> tuple[list[str], bool]:
    stream = TextStream(decode, stop, before=list(before.encode()))
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    pieces.append(stream.close())
    return pieces, stream.stopped


@given(st.text(max_size=30), st.text(max_size=5))
def test_pieces_make_the_text(text: str, before: str) -> None:
    pieces, stopped = run(text, before=before)
    assert "".join(pieces) == text
    assert not stopped
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(
    st.text(alphabet="ab.", max_size=30),
    st.lists(st.text(alphabet="ab.", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, stopped = run(text, stop)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    assert stopped == bool(ends)
    if ends:
        begun = text[: ends[0]]
        assert "".join(pieces) == begun[: min(begun.find(s) for s in stop if s in begun)]
    else:
        assert "".join(pieces) == text


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    assert run("a\nb\n\nc", ["\n\n"])[0] == ["a", "", "\nb", "", "", ""]
    assert run("héé")[0] == ["h", "", "é", "", "é", ""]


def test_bytes_that_never_become_a_character_are_given_out_in_the_end() -> None:
    stream = TextStream(decode)
    assert [stream.push(byte) for byte in (0xF0, 0x41)] == ["", "\ufffdA"]
    assert stream.push(0xE2) == ""
    assert stream.close() == "\ufffd"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        TextStream(decode, ["x", ""])
