"""`CorpusTask`: plain text, every target of the horizon counted, nothing asked."""

from mc_ds.data.shards import TokenShards
from mc_ds.data.source import LanguageModelSource
from mc_ds.tasks.base import FINAL_STAGE, TaskSample, no_spans


class CorpusTask:
    """Windows of T + 1 tokens of `shards`, the held-out ones in an evaluation.

    Raises ConfigError where the shards are shorter than a window.
    """

    name = "corpus"

    def __init__(
        self, shards: TokenShards, *, seq_len: int, horizon_tokens: int, seed: int
    ) -> None:
        self._source = LanguageModelSource(
            shards, seq_len=seq_len, horizon_tokens=horizon_tokens, seed=seed
        )

    @property
    def windows_per_epoch(self) -> int:
        """Number of sequences that read the whole text once."""
        return self._source.windows_per_epoch

    def sample(self, index: int, stage: int = FINAL_STAGE) -> TaskSample:
        """Return window `index`, the same in every stage."""
        tokens, horizon_mask = self._source.sample(index, stage)
        return TaskSample(
            tokens, horizon_mask, spans=no_spans(), distractors=no_spans(), other=None
        )
