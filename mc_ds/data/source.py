"""`LanguageModelSource`: plain text sequences from token shards, for next-token prediction."""

from pathlib import Path
from typing import Protocol

import numpy as np

from mc_ds.config import DataConfig
from mc_ds.data.batch import Sample
from mc_ds.data.sampling.documents import DocumentSampler, index_documents
from mc_ds.data.sampling.windows import WindowSampler
from mc_ds.data.shards import TokenShards


class Windows(Protocol):
    """An order in which the windows of a text are drawn, each once per epoch."""

    windows_per_epoch: int

    def start(self, index: int) -> int:
        """Return the first token of sample `index` >= 0."""
        ...


def windows_of(
    shards: TokenShards, config: DataConfig, *, seq_len: int, seed: int, cache: Path
) -> Windows:
    """Return the sampler of a text's windows of `seq_len` + 1 tokens, by `config.packing`.

    The packing `document` builds an index in `cache` on first use. Raises ConfigError if the text
    has no such window.
    """
    if config.packing == "stream":
        return WindowSampler(len(shards), window=seq_len + 1, stride=seq_len, seed=seed)
    index = index_documents(
        shards,
        seq_len=seq_len,
        min_document_tokens=config.min_document_tokens,
        cache=cache,
    )
    return DocumentSampler(index, seq_len=seq_len, seed=seed)


def left_out(shards: TokenShards, config: DataConfig, *, seq_len: int, cache: Path) -> str | None:
    """Return a phrase that says which documents packing leaves out; None if it keeps all."""
    windows = windows_of(shards, config, seq_len=seq_len, seed=0, cache=cache)
    if not isinstance(windows, DocumentSampler) or not windows.index.dropped:
        return None
    index = windows.index
    return (
        f"{index.dropped:,} of {index.dropped + index.documents:,} documents, which are too short,"
        f" with {index.dropped_tokens / len(shards):.1%} of the tokens"
    )


class LanguageModelSource:
    """Returns windows of T + 1 tokens, each once per epoch, with equal weights in the horizon.

    `windows` determines the order (default: a WindowSampler with `seed`). `name` is used in the
    metric `data/epoch/{name}`. Raises ConfigError if the shards have fewer than T + 1 tokens.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        horizon_tokens: int,
        seed: int,
        name: str = "corpus",
        windows: Windows | None = None,
    ) -> None:
        self._shards, self._name = shards, name
        self._seq_len = seq_len
        self._horizon_tokens = horizon_tokens
        self._windows = windows or WindowSampler(
            len(shards), window=seq_len + 1, stride=seq_len, seed=seed
        )

    def sample(self, index: int, stage: int) -> Sample:
        """Return sequence `index`, which is the same at every `stage`."""
        tokens = self._shards.window(self._windows.start(index), self._seq_len + 1)
        return Sample(tokens, np.ones(self._horizon_tokens, dtype=np.float32))

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how often the first `samples` sequences read the text."""
        return {self._name: samples / self._windows.windows_per_epoch}
