"""`LanguageModelSource`: plain next-token sequences from token shards."""

import numpy as np

from mc_ds.data.batch import Sample
from mc_ds.data.sampler import WindowSampler
from mc_ds.data.shards import TokenShards


class LanguageModelSource:
    """Windows of T + 1 tokens, every one once per epoch, in an order keyed by `seed`; each
    horizon target counts the same. `name` is that of the text in `data/epoch/{name}`.

    Raises ConfigError where the shards hold fewer than T + 1 tokens.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        horizon_tokens: int,
        seed: int,
        name: str = "corpus",
    ) -> None:
        self._shards, self._name = shards, name
        self._seq_len = seq_len
        self._horizon_tokens = horizon_tokens
        self._sampler = WindowSampler(len(shards), window=seq_len + 1, stride=seq_len, seed=seed)

    def sample(self, index: int, stage: int) -> Sample:
        """Return sequence `index`; the same in every stage."""
        tokens = self._shards.window(self._sampler.start(index), self._seq_len + 1)
        return Sample(tokens, np.ones(self._horizon_tokens, dtype=np.float32))

    @property
    def windows_per_epoch(self) -> int:
        """Number of sequences that read the whole text once."""
        return self._sampler.windows_per_epoch

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how often the first `samples` sequences read the text."""
        return {self._name: samples / self.windows_per_epoch}
