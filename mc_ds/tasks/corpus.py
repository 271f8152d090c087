"""`CorpusTask`: plain text without a question; every target of the horizon counts."""

from mc_ds.data.source import LanguageModelSource
from mc_ds.tasks.base import FINAL_STAGE, TaskSample, no_spans


class CorpusTask:
    """Windows of T + 1 tokens of a text."""

    name = "corpus"

    def __init__(self, source: LanguageModelSource) -> None:
        self._source = source

    def sample(self, index: int, stage: int = FINAL_STAGE) -> TaskSample:
        """Return window `index`, the same in every stage."""
        tokens, horizon_mask = self._source.sample(index, stage)
        return TaskSample(
            tokens, horizon_mask, spans=no_spans(), distractors=no_spans(), other=None
        )

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how many passes over the text the first `samples` windows make, keyed by its
        name.
        """
        return self._source.epochs(samples)
