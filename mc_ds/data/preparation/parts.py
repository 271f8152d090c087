"""Parts: what a worker makes of a block, one file each, named by a digest of all that decides it.

A part appears whole, so that a preparation that was killed goes on from the parts that are there;
what has changed since has another name.
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
"""Raised whenever the same block gives another part."""


@dataclass
class Part:
    """The records of a block, encoded; R records, n tokens."""

    digests: NDArray[np.uint8]
    """[R, 16] digest of each record's text."""
    lengths: NDArray[np.int64]
    """[R] tokens of each record, the separator before a document included."""
    sources: NDArray[np.int32]
    """[R] number of each record's file."""
    continues: NDArray[np.bool_]
    """[R] whether a record is a further piece of the document before it."""
    tokens: NDArray[Any]
    """[n] ids, record after record."""
    faults: Faults = field(default_factory=Faults)
    failed: list[int] = field(default_factory=list)
    """Numbers of files of which nothing must be used."""

    def without(self, sources: Collection[int]) -> "Part":
        """Return the part without the records of some files."""
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
    """Return the name of a block's part; `settings` stands for what else decides it."""
    digest = hashlib.blake2b(f"{FORMAT} {settings}".encode(), digest_size=16)
    for segment in block:
        sizes = [-1 if record is None else len(record) for record in segment.records]
        facts = (segment.source, segment.form, segment.first, segment.continues, sizes)
        digest.update(repr((facts, segment.name)).encode(errors="surrogateescape"))
        for record in segment.records:
            digest.update(record or b"")
    return f"{digest.hexdigest()}.safetensors"


def write_part(path: Path, part: Part) -> None:
    """Write a part, through to disk."""
    arrays = {
        name: np.ascontiguousarray(getattr(part, name))
        for name in ("digests", "lengths", "sources", "continues", "tokens")
    }
    facts = [dict(part.faults.counts), part.faults.examples, part.failed]
    with replace_file(path) as file:
        file.write(save(arrays, metadata={"facts": json.dumps(facts)}))


def read_part(path: Path, *, with_tokens: bool = True) -> Part:
    """Read a part, without its tokens where they are not needed."""
    with safe_open(path, framework="np") as file:
        counts, examples, failed = json.loads(file.metadata()["facts"])
        arrays = {
            name: file.get_tensor(name) for name in ("digests", "lengths", "sources", "continues")
        }
        tokens = file.get_tensor("tokens") if with_tokens else np.zeros(0, np.uint16)
    faults = Faults()
    faults.merge(counts, [(reason, message) for reason, message in examples])
    return Part(**arrays, tokens=tokens, faults=faults, failed=failed)
