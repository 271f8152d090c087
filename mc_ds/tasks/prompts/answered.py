"""`AnsweredPrompts`: prompts followed by their answers, as a task. Models learn from their losses
to answer prompts, and LensNet which parts of a prompt the answer needs.

Legend: T tokens, h horizon tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import ConfigError, MCConfig
from mc_ds.data.sampling.windows import derive_key
from mc_ds.tasks.base import FINAL_STAGE, TaskSample
from mc_ds.tasks.prompts.base import Prompt, PromptTask

CHECKED = 8
"""Number of prompts whose answers must fit the horizon."""


class AnsweredPrompts:
    """Sequences of T + 1 tokens: a prompt of T - h + 1 tokens, its answers in one sentence, and
    text of the corpus up to the end of the horizon. Only the sentence counts in a row's score. It
    is cut off where the horizon ends. The spans of facts are in the order of the text.
    """

    def __init__(self, prompts: PromptTask, mc: MCConfig) -> None:
        """Raise ConfigError if T is too short for a prompt, h for answers, or the protected tail
        for question and horizon. The first prompts are tried.
        """
        self.name = prompts.name
        self._prompts, self._seq_len, self._horizon = prompts, mc.seq_len, mc.horizon_tokens
        self._length = self._seq_len - self._horizon + 1
        first = self._first(self._horizon)
        longest = self._longest(first)
        if longest > self._horizon:
            while (other := self._longest(self._first(longest))) > longest:
                longest = other  # another horizon leaves another length, and thus other prompts
            raise ConfigError(
                f"task {self.name}: answers do not fit mc.horizon_tokens = {self._horizon}: use at"
                f" least {longest}"
            )
        needed = max(prompt.question_tokens for prompt in first) + self._horizon
        if needed > mc.recent_tokens:
            raise ConfigError(
                f"task {self.name}: the question and mc.horizon_tokens = {self._horizon} take"
                f" {needed} tokens, more than mc.recent_tokens = {mc.recent_tokens}: use at least"
                f" {needed}"
            )

    def sample(self, index: int, stage: int = FINAL_STAGE) -> TaskSample:
        """Return sequence `index`, the same in every stage."""
        prompt = self._prompts.prompt(index, self._length)
        answer = self._answer(prompt)[: self._horizon]
        rng = np.random.default_rng(derive_key(self._prompts.key, index))
        after = self._prompts.source.text(rng, self._horizon - len(answer))
        mask = np.zeros(self._horizon, dtype=np.float32)
        mask[: len(answer)] = 1
        return TaskSample(
            np.concatenate([prompt.tokens, answer, after]),
            mask,
            spans=prompt.spans,
            distractors=prompt.distractors,
            other=None,
        )

    def epochs(self, samples: int) -> dict[str, float]:
        """Return at most how many passes over the text the first `samples` sequences make, keyed
        by the task's name. (Some haystacks contain none of it.)
        """
        return {self.name: samples * self._length / self._prompts.source.tokens}

    def _answer(self, prompt: Prompt) -> NDArray[np.int64]:
        text = " " + ", ".join(prompt.answers) + ".\n"
        return np.array(self._prompts.source.tokenizer.encode(text), dtype=np.int64)

    def _first(self, horizon: int) -> list[Prompt]:
        length = self._seq_len - horizon + 1
        return [self._prompts.prompt(index, length) for index in range(CHECKED)]

    def _longest(self, prompts: Sequence[Prompt]) -> int:
        return max(len(self._answer(prompt)) for prompt in prompts)
