"""Long documents are cut at the same places wherever they come from."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_ds.data.text import cutting


@given(
    text=st.text(st.sampled_from("ab\n\u00e9\u65e5\U0001f600"), max_size=80),
    read=st.integers(1, 30),
)
def test_pieces_join_to_the_document_and_do_not_depend_on_how_it_is_read(
    text: str, read: int
) -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, read))

    content = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "PIECE_BYTES", 8)
        patch.setattr(cutting, "WINDOW", 12)
        found = list(cutting.pieces(content))
        assert found == list(cutting.pieces_of(Slow(content)))
    assert b"".join(found) == content
    assert all(5 <= len(piece) <= 12 for piece in found[:-1])
    assert len(found[-1]) <= 12
    for piece in found:
        piece.decode()


def test_the_cut_is_after_a_line_break_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "PIECE_BYTES", 8)
    monkeypatch.setattr(cutting, "WINDOW", 12)
    assert list(cutting.pieces(b"aaa\nbbbbbb\ncc\ndddd")) == [b"aaa\nbbbbbb\n", b"cc\ndddd"]
    assert list(cutting.pieces(b"a" * 20)) == [b"a" * 8, b"a" * 12]
