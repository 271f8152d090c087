"""`Chains`: facts `key = value` that may name one another, asked by their key.

    hops 1      planted  k1 = a b c d
                asked    ? k1 k2 k3 \\n      horizon  k1 = a b c d  k2 = ...
    hops 2      planted  k1 = k4  and  k4 = a b c d
                asked    ? k1 k2 k3 \\n      horizon  k1 = a b c d  k2 = ...
    all values  planted  k1 = a b c d k4  and  k4 = e f g h
                asked    ? k1 k2 k3 \\n      horizon  k1 = a b c d k4 = e f g h  k2 = ...

A value is either letters or a key, so a reader can tell whether to go on. With `values` "all"
each fact has letters of its own, and the answers tell them fact by fact: each then lowers the loss
by itself, where otherwise the first is worth nothing until the second is read too. Keys are
distinct; each asked fact occurs once before the horizon.

Sources: docs/model.md ("Preference learning"), and for the variants that `registry` names, RULER
(Hsieh et al., arXiv:2404.06654).
"""

from typing import Literal

import numpy as np
from pydantic import PositiveInt, model_validator

from mc_ds.tasks.planting import Family, Query, Story, Tokens, distinct_rows
from mc_ds.tasks.vocabulary import TaskVocabulary


class Chains(Family):
    """Chains of `hops` facts: the last fact holds a value of letters, each other one the key of
    the next.
    """

    questions: PositiveInt = 3
    """Chains asked for, at most."""
    min_questions: PositiveInt | None = None
    """Chains asked for at least: each sequence asks for a random number of them; empty: always
    `questions`.
    """
    leave_another: bool = False
    """Ask for no more of them than leaves as many for the other question, as far as `min_questions`
    permits.
    """
    value_tokens: PositiveInt = 4
    """Letters of a value."""
    hops: PositiveInt = 1
    """Facts from the asked one to the value."""
    values: Literal["last", "all"] = "last"
    """Which facts of a chain have a value: the last; or all, each before the key that it names,
    and the answers are all of them.
    """
    definition_first: bool = False
    """Plant the facts of a chain so that a reader meets each key before it is referred to; else
    anywhere.
    """

    @model_validator(mode="after")
    def _check(self) -> "Chains":
        if self.min_questions is not None and self.min_questions > self.questions:
            raise ValueError(
                f"min_questions = {self.min_questions} must be at most questions = {self.questions}"
            )
        return self

    @property
    def group_size(self) -> int:
        """The facts of a chain."""
        return self.hops

    @property
    def in_reading_order(self) -> bool:
        """Chains are listed from the value on."""
        return self.definition_first

    @property
    def min_facts(self) -> int:
        """All facts of the chains asked for."""
        return self.questions * self.hops

    @property
    def fact_tokens(self) -> int:
        """Key, mark, and a value of letters or a key, or of both."""
        named = self.key_tokens if self.hops > 1 else 0
        return (
            self.key_tokens
            + 1
            + (self.value_tokens + named if self.values == "all" else max(self.value_tokens, named))
        )

    @property
    def question_tokens(self) -> int:
        """Two marks around keys."""
        return 2 + self.questions * self.key_tokens

    @property
    def horizon_tokens(self) -> int:
        """Per chain a key, a mark and a value, or one for each fact."""
        return self.questions * self._values_told * (self.key_tokens + 1 + self.value_tokens)

    @property
    def _values_told(self) -> int:
        """Values of a chain, which the answers tell."""
        return self.hops if self.values == "all" else 1

    def num_keys(self, num_facts: int) -> int:
        """Return one for each fact."""
        return num_facts

    def draw(self, rng: np.random.Generator, num_facts: int, vocabulary: TaskVocabulary) -> Story:
        """Ask for the first chains, and for as many of the next ones in the other question;
        places and keys are random already.
        """
        chains = num_facts // self.hops
        keys = distinct_rows(rng, num_facts, vocabulary.keys, self.key_tokens).reshape(
            chains, self.hops, self.key_tokens
        )
        shape = (chains, self._values_told, self.value_tokens)
        values = vocabulary.letters[rng.integers(len(vocabulary.letters), size=shape)]
        facts = [
            key_value(
                vocabulary,
                keys[chain, fact],
                np.concatenate([*values[chain, fact : fact + 1], *keys[chain, fact - 1 : fact]]),
            )
            for chain in range(chains)
            for fact in range(self.hops)
        ]
        count = self._count(rng, chains)
        first, second = range(count), range(count, 2 * count)
        other = self._query(vocabulary, keys, values, second) if second.stop <= chains else None
        return Story(
            facts,
            keys=np.unique(keys),
            asked=self._query(vocabulary, keys, values, first),
            other=other,
        )

    def _count(self, rng: np.random.Generator, chains: int) -> int:
        """Return how many of the `chains` are asked for. `leave_another` caps it at half the
        chains, so that another question remains; smaller numbers are unchanged.
        """
        if self.min_questions is None:
            return self.questions
        count = int(rng.integers(self.min_questions, self.questions, endpoint=True))
        return (
            min(count, chains // 2)
            if self.leave_another and self.min_questions <= chains // 2
            else count
        )

    def _query(
        self, vocabulary: TaskVocabulary, keys: Tokens, values: Tokens, chains: range
    ) -> Query:
        """Return the question about `chains`; `keys` [chains, hops, key_tokens], `values` [chains,
        1 or hops, value_tokens], facts last first.
        """
        given = keys[chains, -1].ravel()
        question = np.concatenate([[vocabulary.question], given, [vocabulary.newline]])
        asked_first = keys[:, ::-1][:, : self._values_told]
        marks = np.full_like(asked_first[..., :1], vocabulary.equals)
        told = np.concatenate([asked_first, marks, values[:, ::-1]], axis=2)[chains]
        mask = np.zeros(told.shape, bool)
        mask[..., self.key_tokens + 1 :] = True
        needed = [
            chain * self.hops + fact for chain in chains for fact in reversed(range(self.hops))
        ]
        return Query(question, told.ravel(), mask.ravel(), needed, self.hops)


def key_value(vocabulary: TaskVocabulary, key: Tokens, value: Tokens) -> Tokens:
    """Return the tokens of `key = value`."""
    return np.concatenate([key, [vocabulary.equals], value])
