"""Part files: the encoded records of one block each.

A part appears under its name only when complete, so that an interrupted preparation resumes from
the existing parts. Its name is a digest of block and settings: if these change, so does the name.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from mc_ds.data.text.faults import Faults
from mc_ds.data.text.readers import Segment
from mc_ds.storage import replace_file

FORMAT = 1
"""Incremented whenever the same block would give a different part."""


@dataclass
class Part:
    """The encoded records of a block: R records, n tokens."""

    digests: NDArray[np.uint8]
    """[R, 16] digest of each record's text."""
    lengths: NDArray[np.int64]
    """[R] tokens of each record, including the separator before a document."""
    sources: NDArray[np.int32]
    """[R] index of each record's file."""
    continues: NDArray[np.bool_]
    """[R] True if a record is another piece of the document of the record before it."""
    tokens: NDArray[Any]
    """[n] token ids of all records, concatenated."""
    faults: Faults = field(default_factory=Faults)
    failed: list[int] = field(default_factory=list)
    """Indices of files with a fault, all of whose records must be dropped."""

    def without(self, sources: Collection[int]) -> "Part":
        """Return the part without the records of these files."""
        keep = ~np.isin(self.sources, list(sources))
        if keep.all():
            return self
        return Part(
            digests=self.digests[keep],
            lengths=self.lengths[keep],
            sources=self.sources[keep],
            continues=self.continues[keep],
            tokens=self.tokens[np.repeat(keep, self.lengths)] if self.tokens.size else self.tokens,
        )


def block_name(block: Sequence[Segment], settings: str) -> str:
    """Return the file name of a block's part: a digest of `settings` and the block's content."""
    digest = hashlib.blake2b(f"{FORMAT} {settings}".encode(), digest_size=16)
    for segment in block:
        sizes = [-1 if record is None else len(record) for record in segment.records]
        facts = (segment.source, segment.form, segment.first, segment.continues, sizes)
        digest.update(repr((facts, segment.name)).encode(errors="surrogateescape"))
        for record in segment.records:
            digest.update(record or b"")
    return f"{digest.hexdigest()}.safetensors"


def write_part(path: Path, part: Part) -> None:
    """Write a part file atomically, synced to disk."""
    arrays = {
        name: np.ascontiguousarray(getattr(part, name))
        for name in ("digests", "lengths", "sources", "continues", "tokens")
    }
    facts = [dict(part.faults.counts), part.faults.examples, part.failed]
    with replace_file(path) as file:
        file.write(save(arrays, metadata={"facts": json.dumps(facts)}))


def read_part(path: Path, *, with_tokens: bool = True) -> Part:
    """Read a part file; `with_tokens=False` leaves `tokens` empty and saves reading them."""
    with safe_open(path, framework="np") as file:
        counts, examples, failed = json.loads(file.metadata()["facts"])
        arrays = {
            name: file.get_tensor(name) for name in ("digests", "lengths", "sources", "continues")
        }
        tokens = file.get_tensor("tokens") if with_tokens else np.zeros(0, np.uint16)
    faults = Faults()
    faults.merge(counts, [(reason, message) for reason, message in examples])
    return Part(**arrays, tokens=tokens, faults=faults, failed=failed)
