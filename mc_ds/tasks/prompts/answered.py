"""`AnsweredPrompts`: prompts followed by their answers, as a task. Models learn from their losses
to answer prompts, and LensNet which parts of a prompt the answer needs.

Legend: T tokens, h horizon tokens.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import ConfigError, MCConfig
from mc_ds.data.sampling.windows import derive_key
from mc_ds.tasks.base import FINAL_STAGE, TaskSample, errors_of
from mc_ds.tasks.prompts.base import Prompt, PromptTask


class AnsweredPrompts:
    """Sequences of T + 1 tokens: a prompt of T - h + 1 tokens, its answers in one sentence, and
    text of the corpus up to the end of the horizon. Only the sentence counts in a row's score.
    """

    def __init__(self, prompts: PromptTask, mc: MCConfig) -> None:
        """Raise ConfigError if T is too short for a prompt, or h for the answers to the first."""
        self.name = prompts.name
        self._prompts = prompts
        self._length, self._horizon = mc.seq_len - mc.horizon_tokens + 1, mc.horizon_tokens
        self.sample(0)

    def sample(self, index: int, stage: int = FINAL_STAGE) -> TaskSample:
        """Return sequence `index`, the same in every stage. Raises ConfigError if the horizon is
        too short for its answers.
        """
        prompt = self._prompts.prompt(index, self._length)
        answer = self._answer(prompt)
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
        return {self.name: samples * self._length / self._text_tokens}

    @cached_property
    def _text_tokens(self) -> int:
        return self._prompts.source.tokens

    def _answer(self, prompt: Prompt) -> NDArray[np.int64]:
        text = " " + ", ".join(prompt.answers) + ".\n"
        answer = np.array(self._prompts.source.tokenizer.encode(text), dtype=np.int64)
        if len(answer) > self._horizon:
            with errors_of(self.name):
                raise ConfigError(
                    f"answers take {len(answer)} tokens, more than mc.horizon_tokens ="
                    f" {self._horizon}: use at least {len(answer)}"
                )
        return answer
