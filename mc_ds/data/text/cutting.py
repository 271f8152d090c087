"""Long documents are read, hashed and encoded in pieces: memory stays bounded, and no tokenizer
gets a text that it is slow on.

Where a document is cut depends on its bytes alone, not on the file that holds it.
"""

import hashlib
from collections.abc import Iterator
from typing import IO

PIECE_BYTES = 1 << 18
"""A longer document is cut after the first line break from here on."""
LINE_BYTES = 1 << 14
"""Bytes that are searched for that line break; without one the cut is between two characters."""
WINDOW = PIECE_BYTES + LINE_BYTES


def digest_of(piece: bytes) -> bytes:
    """Return the digest of a piece, 16 bytes."""
    return hashlib.blake2b(piece, digest_size=16).digest()


def key_of(first_piece: bytes) -> int:
    """Return the number, below 2**64, that decides the split of a document."""
    return int.from_bytes(digest_of(first_piece)[:8], "little")


def pieces(content: bytes) -> Iterator[bytes]:
    """Cut a document that is in memory; an empty one has one piece."""
    start = 0
    while len(content) - start > WINDOW:
        length = _cut(content[start : start + WINDOW])
        yield content[start : start + length]
        start += length
    yield content[start:]


def pieces_of(stream: IO[bytes]) -> Iterator[bytes]:
    """Cut a document that a stream holds, as `pieces` does."""
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
    """Return the length of the first piece of a document that fills a window, and more."""
    if found := window.find(b"\n", PIECE_BYTES - 1) + 1:
        return found
    length = PIECE_BYTES
    while length > PIECE_BYTES - 4 and window[length] & 0xC0 == 0x80:  # inside a character
        length -= 1
    return length
