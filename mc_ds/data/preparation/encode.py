"""Encodes a block of records to a part file, in a worker process."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from mc_ds.data.preparation.parts import Part, write_part
from mc_ds.data.text.cutting import PIECE_BYTES, digest_of, pieces
from mc_ds.data.text.documents import document
from mc_ds.data.text.faults import Fault, Faults
from mc_ds.data.text.readers import Segment
from mc_ds.data.tokenizer import Tokenizer

TEXTS_BYTES = 1 << 18
"""Minimum characters encoded at once. Limits memory: tokenizers return ids as Python integers."""
_worker: list[tuple[Tokenizer, str]] = []
"""Tokenizer and text field of this worker process; empty in other processes."""


@dataclass
class _Rows:
    """Columns of a part under construction."""

    texts: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    continues: list[bool] = field(default_factory=list)


def start_worker(tokenizer: Tokenizer, text_field: str) -> None:
    """Set up a worker process: it ignores Ctrl-C, which its parent handles, and exits when its
    parent does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker[:] = [(tokenizer, text_field)]


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)


def encode_block(block: Sequence[Segment], path: Path) -> None:
    """Encode a block and write it to `path` as a part file."""
    tokenizer, text_field = _worker[0]
    write_part(path, make_part(block, tokenizer, text_field))


def make_part(block: Sequence[Segment], tokenizer: Tokenizer, text_field: str) -> Part:
    """Encode the documents of a block.

    A record with a fault is skipped; in plain text its whole file is marked as failed.
    """
    rows, faults, failed = _Rows(), Faults(), list[int]()
    for segment in block:
        for text, continues in _texts(segment, text_field, faults, failed):
            rows.texts.append(text.decode())
            rows.digests.append(digest_of(text))
            rows.sources.append(segment.source)
            rows.continues.append(continues)
    tokens = [
        np.array(ids if continues else [tokenizer.separator_id, *ids], dtype=np.uint32)
        for ids, continues in zip(_encoded(rows.texts, tokenizer), rows.continues, strict=True)
    ]
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    return Part(
        digests=np.frombuffer(b"".join(rows.digests), np.uint8).reshape(-1, 16),
        lengths=np.array([ids.size for ids in tokens], dtype=np.int64),
        sources=np.array(rows.sources, dtype=np.int32),
        continues=np.array(rows.continues, dtype=np.bool_),
        tokens=np.concatenate([np.zeros(0, np.uint32), *tokens]).astype(dtype),
        faults=faults,
        failed=failed,
    )


def _texts(
    segment: Segment, text_field: str, faults: Faults, failed: list[int]
) -> Iterator[tuple[bytes, bool]]:
    """Yield each piece of a segment's documents, and whether it continues the piece before it."""
    for number in range(len(segment.records)):
        try:
            content = document(segment, number, text_field)
        except Fault as fault:
            faults.add(fault)
            if segment.form == "text":
                failed.append(segment.source)
            continue
        if content is None:
            continue
        if segment.form == "text" and (segment.continues or len(content) >= PIECE_BYTES):
            yield content, segment.continues
        elif content.strip():
            for count, piece in enumerate(pieces(content)):
                yield piece, count > 0
        else:
            faults.counts["empty"] += 1


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield the token ids of each text."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= TEXTS_BYTES:
            yield from tokenizer.encode_many(batch, threads=1)
            batch, size = [], 0
    yield from tokenizer.encode_many(batch, threads=1)
