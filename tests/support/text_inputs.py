"""Small inputs of every form, and a dataset's documents read back."""

import gzip
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mc_ds.data.dataset import Dataset
from mc_ds.data.shards import TokenShards
from tests.support.optional import optional

NOISE = random.Random(0).randbytes(3000)
"""Bytes that do not compress, the same in every process: names of tests are made of them."""


def some_texts(count: int, *, first: int = 0) -> list[str]:
    """Different texts of one to nine lines."""
    return [
        "".join(f"value_{i} = compute(item_{line}, {i * line})\n" for line in range(i % 9 + 1))
        for i in range(first, first + count)
    ]


def json_lines(texts: Sequence[Any], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, field: t}).encode() + b"\n" for i, t in enumerate(texts))


def zst(content: bytes) -> bytes:
    pyarrow = optional("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def parquet(texts: Sequence[Any], field: str = "text") -> bytes:
    pyarrow, pq = optional("pyarrow"), optional("pyarrow.parquet")
    sink = io.BytesIO()
    pq.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), sink)
    return sink.getvalue()


def documents_of(dataset: Dataset, split: str) -> list[str]:
    shards: TokenShards = getattr(dataset, split)
    starts = shards.documents.tolist()
    ends = [*starts[1:], len(shards)]
    return [
        dataset.tokenizer.decode(shards.window(start, end - start))
        for start, end in zip(starts, ends, strict=True)
    ]


def all_documents(dataset: Dataset) -> list[str]:
    return [*documents_of(dataset, "train"), *documents_of(dataset, "validation")]


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
