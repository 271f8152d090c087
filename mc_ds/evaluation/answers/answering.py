"""Answering: sessions read prompts through working contexts and write the answers.

A prompt is ingested once, into a tree in memory. For every policy and budget a session over that
tree generates a continuation greedily, with the refocusing of a generation, and the continuation is
scored. All policies get contexts of the same number of entries: the longest cover within the
budget. `full` reads everything.

Legend: N tokens of a prompt, h horizon, W entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mc_ds.config.focus import FocusConfig
from mc_ds.drawing import token_lods
from mc_ds.evaluation.answers.records import AnswerRecord
from mc_ds.focus.policies import PolicySpec
from mc_ds.inference import SESSION_POLICIES, InferenceModel, MegaContextTree, Session
from mc_ds.tasks.prompts import Prompt, PromptTask, score

ANSWERING_POLICIES = (*SESSION_POLICIES, "full")
"""Policies that can read prompts, which have no other question."""


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Answers prompts with `model`, whose bundle must have a tokenizer."""

    model: InferenceModel
    specs: Sequence[PolicySpec]
    budgets: Sequence[float]
    """Shares of N."""
    focus: FocusConfig | None = None
    """Settings of the focus allocator; None: the model's."""
    seed: int = 0
    """Seed of random choices."""
    search: bool | int | None = None
    """See `InferenceModel.session`."""

    def check(self, tasks: Sequence[PromptTask], length: int) -> None:
        """Raise ConfigError if a task has no prompts of `length` tokens, and ValueError if a budget
        is too small for them.
        """
        for task in tasks:
            task.prompt(0, length)
        for spec in self.specs:
            for budget in self._budgets(spec):
                self.entries(spec, budget, length)

    def run(self, task: PromptTask, ids: Sequence[int], length: int) -> Iterator[AnswerRecord]:
        """Yield a record per prompt of `ids`, policy and budget. `full` is left out beyond the
        length that the model was trained at (`reads_whole`).
        """
        for index in ids:
            prompt = task.prompt(index, length)
            tree = self.model.open_tree("ram")
            tree.append(prompt.tokens)
            for spec in self.specs:
                for budget in self._budgets(spec):
                    if spec.fixed_length is None or self.reads_whole(length):
                        yield self._answer(task.name, index, prompt, spec, budget, tree)
                        tree.truncate(length)

    def reads_whole(self, length: int) -> bool:
        """Return whether the model was trained on sequences as long as a prompt."""
        return length <= self.model.config.mc.seq_len

    def entries(self, spec: PolicySpec, budget: float, length: int) -> int:
        """Return W for a share of a prompt's tokens; for `full`, enough for the prompt alone."""
        mc = self.model.mc
        inputs = length - 1 + mc.horizon_tokens
        if spec.fixed_length is not None:
            return inputs
        return mc.geometry.with_length(inputs).reachable_at_most(budget * length)

    def _budgets(self, spec: PolicySpec) -> Sequence[float]:
        return self.budgets if spec.fixed_length is None else [1.0]

    def _answer(
        self,
        task: str,
        index: int,
        prompt: Prompt,
        spec: PolicySpec,
        budget: float,
        tree: MegaContextTree,
    ) -> AnswerRecord:
        tokenizer, length = self.model.tokenizer, len(prompt.tokens)
        assert tokenizer is not None
        entries = self.entries(spec, budget, length)
        session = self._session(spec, entries, prompt, tree, index)
        lods, starts = session.working_context()
        known = token_lods(lods, starts, self.model.mc.block_size, length)
        written = session.generate(prompt.max_new_tokens, stop=prompt.stop)
        text = tokenizer.decode(written)
        return AnswerRecord(
            task=task,
            seq_len=length,
            policy=spec.name,
            query_tokens=spec.query_tokens,
            budget=budget,
            wc_length=entries,
            index=index,
            score=score(prompt, text),
            hit_rate=_share_read(known, prompt.spans),
            distractor_rate=_share_read(known, prompt.distractors),
            answers=list(prompt.answers),
            written=text,
        )

    def _session(
        self, spec: PolicySpec, entries: int, prompt: Prompt, tree: MegaContextTree, index: int
    ) -> Session:
        """Return a session of the policy; `full` is a recency window that is long enough for the
        prompt and its continuation.
        """
        whole = spec.fixed_length is not None
        return self.model.session(
            "recency" if whole else spec.name,
            entries + prompt.max_new_tokens if whole else entries,
            tree,
            seed=(self.seed, index),
            search=self.search,
            focus=self.focus,
            retrieval=spec.retrieval,
        )


def _share_read(lods: NDArray[np.int64], spans: NDArray[np.int64]) -> float | None:
    """Return the fraction of `spans` that are read completely at LOD0; None without spans."""
    if not len(spans):
        return None
    return float(np.mean([bool((lods[first:last] == 0).all()) for first, last in spans]))
