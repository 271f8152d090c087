"""Cuts long documents into pieces to read, hash and encode.

This bounds memory, and spares tokenizers very long texts, on which some are slow. The cuts depend
only on the document's bytes, not on the file that contains it.
"""

import hashlib
from collections.abc import Iterator
from typing import IO

PIECE_BYTES = 1 << 18
"""Minimum bytes of a piece that is not the last: it is cut after the next line break."""
LINE_BYTES = 1 << 14
"""Bytes searched for that line break; if there is none, the cut is between two characters."""
WINDOW = PIECE_BYTES + LINE_BYTES


def digest_of(piece: bytes) -> bytes:
    """Return the 16-byte digest of a piece."""
    return hashlib.blake2b(piece, digest_size=16).digest()


def key_of(first_piece: bytes) -> int:
    """Hash a document's first piece to a number below 2**64, which decides the document's split."""
    return int.from_bytes(digest_of(first_piece)[:8], "little")


def pieces(content: bytes) -> Iterator[bytes]:
    """Yield the pieces of a document in memory. An empty document has one, empty piece."""
    start = 0
    while len(content) - start > WINDOW:
        length = _cut(content[start : start + WINDOW])
        yield content[start : start + length]
        start += length
    yield content[start:]


def pieces_of(stream: IO[bytes]) -> Iterator[bytes]:
    """Read a document from a stream, and yield the same pieces as `pieces`."""
    buffer = b""
    while True:
        while len(buffer) <= WINDOW and (more := stream.read(WINDOW + 1 - len(buffer))):
            buffer += more
        if len(buffer) <= WINDOW:
            yield buffer
            return
        length = _cut(buffer[:WINDOW])
        yield buffer[:length]
        buffer = buffer[length:]


def _cut(window: bytes) -> int:
    """Return the length of a document's next piece, given its next WINDOW bytes."""
    if found := window.find(b"\n", PIECE_BYTES - 1) + 1:
        return found
    length = PIECE_BYTES
    while length > PIECE_BYTES - 4 and window[length] & 0xC0 == 0x80:  # inside a character
        length -= 1
    return length
