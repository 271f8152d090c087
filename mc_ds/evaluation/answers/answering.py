"""Answering: sessions read prompts through working contexts and write the answers.

A prompt is ingested once, into a tree in memory. For every policy and budget a session over that
tree generates a continuation greedily, with the refocusing of a generation, and the continuation is
scored. It ends at a token that ends a text or a turn. Several prompts are continued
in one batch. All policies get contexts of the same number of entries: the longest cover within the
budget. `full` reads everything.

Legend: N tokens of a prompt, h horizon, W entries.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mc_ds.config.focus import FocusConfig
from mc_ds.drawing import token_lods
from mc_ds.evaluation.answers.records import AnswerRecord
from mc_ds.focus.policies import PolicySpec
from mc_ds.inference import SESSION_POLICIES, InferenceModel, MegaContextTree, Session
from mc_ds.inference.model import KEEP_PREFIX
from mc_ds.inference.settings import Settings
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
    batch_size: int = 1
    """Number of prompts that are continued together."""

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
        for start in range(0, len(ids), self.batch_size):
            batch = {index: task.prompt(index, length) for index in ids[start:][: self.batch_size]}
            trees = [self._tree(prompt) for prompt in batch.values()]
            for spec in self.specs:
                for budget in self._budgets(spec):
                    if spec.fixed_length is None or self.reads_whole(length):
                        yield from self._answer(task.name, batch, spec, budget, trees)
                        for tree in trees:
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

    def _tree(self, prompt: Prompt) -> MegaContextTree:
        tree = self.model.open_tree("ram")
        tree.append(prompt.tokens)
        return tree

    def _answer(
        self,
        task: str,
        batch: Mapping[int, Prompt],
        spec: PolicySpec,
        budget: float,
        trees: Sequence[MegaContextTree],
    ) -> list[AnswerRecord]:
        """Return the records of a batch of prompts, by their numbers, read in one way."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        prompts, length = list(batch.values()), len(trees[0])
        entries = self.entries(spec, budget, length)
        count = max(prompt.max_new_tokens for prompt in prompts)
        sessions = self.model.make(trees, [*self._settings(spec, entries, count, batch)])
        known = [self._known(session, length) for session in sessions]
        written = self.model.generate(
            sessions, count, stop=prompts[0].stop, stop_ids=tuple(tokenizer.end_ids)
        )
        texts = [
            tokenizer.decode(ids[: prompt.max_new_tokens])
            for ids, prompt in zip(written, prompts, strict=True)
        ]
        return [
            AnswerRecord(
                task=task,
                seq_len=length,
                policy=spec.name,
                query_tokens=spec.query_tokens,
                budget=budget,
                wc_length=entries,
                index=index,
                score=score(prompt, text),
                hit_rate=_share_read(lods, prompt.spans),
                distractor_rate=_share_read(lods, prompt.distractors),
                answers=list(prompt.answers),
                written=text,
                settings=spec.settings(self.focus or self.model.config.focus, self.model.mc),
            )
            for (index, prompt), lods, text in zip(batch.items(), known, texts, strict=True)
        ]

    def _known(self, session: Session, length: int) -> NDArray[np.int64]:
        """Return the level at which the session reads each token of its prompt, [N]."""
        return token_lods(*session.working_context(), self.model.mc.block_size, length)

    def _settings(
        self, spec: PolicySpec, entries: int, count: int, ids: Iterable[int]
    ) -> Iterator[Settings]:
        """Yield the settings of a session for each prompt; `full` is a recency window that is long
        enough for the prompt and `count` new tokens.
        """
        whole, config = spec.fixed_length is not None, self.model.config
        for index in ids:
            yield Settings(
                policy="recency" if whole else spec.name,
                budget=entries + count if whole else entries,
                focus=self.focus or config.focus,
                retrieval=spec.retrieval or config.retrieval,
                seed=(self.seed, index),
                search=self.search,
                keep_prefix=KEEP_PREFIX,
            )


def _share_read(lods: NDArray[np.int64], spans: NDArray[np.int64]) -> float | None:
    """Return the fraction of `spans` that are read completely at LOD0; None without spans."""
    if not len(spans):
        return None
    return float(np.mean([bool((lods[first:last] == 0).all()) for first, last in spans]))
