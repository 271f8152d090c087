"""`Chains`: facts `key = value`, which may refer to one another; the question gives keys.

    hops 1      planted  k1 = a b c d
                asked    ? k1 k2 k3 \\n      horizon  k1 = a b c d  k2 = ...
    hops 2      planted  k1 = k4  and  k4 = a b c d
                asked    ? k1 k2 k3 \\n      horizon  k1 = a b c d  k2 = ...
    all values  planted  k1 = a b c d k4  and  k4 = e f g h
                asked    ? k1 k2 k3 \\n      horizon  k1 = a b c d k4 = e f g h  k2 = ...

A value is either letters or a key, so that a reader can tell whether the chain continues. With
`values` "all" each fact has letters of its own, and the answers contain the letters of all facts.
Then reading any fact of the chain lowers the loss; otherwise only reading all of them does. Keys
are distinct, and each asked fact occurs once before the horizon.

Sources: docs/model.md ("Preference learning"); for the variants in `registry`, RULER (Hsieh et al.,
arXiv:2404.06654).
"""

from typing import Literal

import numpy as np
from pydantic import PositiveInt, model_validator

from mc_ds.tasks.planting import Family, Query, Story, Tokens, distinct_rows
from mc_ds.tasks.vocabulary import TaskVocabulary


class Questions(Family):
    """Families whose sequences ask for several facts at once, with values of letters."""

    questions: PositiveInt = 3
    """Number of facts (in `Chains`: of chains) that a sequence asks for; the largest number if
    `min_questions` is set.
    """
    min_questions: PositiveInt | None = None
    """Smallest number of facts that a sequence asks for; each sequence draws its number. Empty:
    always `questions`.
    """
    leave_another: bool = False
    """Ask for at most half of the facts, so that as many are left for the other question, unless
    `min_questions` is larger.
    """
    value_tokens: PositiveInt = 4
    """Number of letters of a value."""

    @model_validator(mode="after")
    def _check(self) -> "Questions":
        if self.min_questions is not None and self.min_questions > self.questions:
            raise ValueError(
                f"min_questions = {self.min_questions} must be at most questions = {self.questions}"
            )
        return self

    def _count(self, rng: np.random.Generator, available: int) -> int:
        """Draw how many of the `available` facts (in `Chains`: chains) are asked for. With
        `leave_another` it is at most half of them, so that another question remains.
        """
        if self.min_questions is None:
            return self.questions
        count = int(rng.integers(self.min_questions, self.questions, endpoint=True))
        return (
            min(count, available // 2)
            if self.leave_another and self.min_questions <= available // 2
            else count
        )


class Chains(Questions):
    """Chains of `hops` facts: the last fact holds a value of letters, each other fact the key of
    the next.
    """

    hops: PositiveInt = 1
    """Number of facts of a chain."""
    values: Literal["last", "all"] = "last"
    """Which facts of a chain have letters: the last one, or all of them, each before the key it
    refers to; then the answers are the letters of all.
    """
    definition_first: bool = False
    """Plant the facts of a chain so that each key is defined before it is referred to; otherwise in
    random order.
    """

    @property
    def group_size(self) -> int:
        """The number of facts of a chain."""
        return self.hops

    @property
    def in_reading_order(self) -> bool:
        """True if chains must be planted as they are listed, from the value to the asked key."""
        return self.definition_first

    @property
    def min_facts(self) -> int:
        """The number of facts of all chains asked for."""
        return self.questions * self.hops

    @property
    def fact_tokens(self) -> int:
        """The length of the longest fact: key, mark, and letters or a key or both."""
        named = self.key_tokens if self.hops > 1 else 0
        return (
            self.key_tokens
            + 1
            + (self.value_tokens + named if self.values == "all" else max(self.value_tokens, named))
        )

    @property
    def question_tokens(self) -> int:
        """The length of the keys and the two marks around them."""
        return 2 + self.questions * self.key_tokens

    @property
    def horizon_tokens(self) -> int:
        """The length of all answers: per chain a key, a mark and letters, or one of these for each
        fact.
        """
        return self.questions * self._values_per_chain * (self.key_tokens + 1 + self.value_tokens)

    @property
    def _values_per_chain(self) -> int:
        """Number of values per chain in the answers."""
        return self.hops if self.values == "all" else 1

    def num_keys(self, num_facts: int) -> int:
        """Return `num_facts`: each fact has a key."""
        return num_facts

    def draw(self, rng: np.random.Generator, num_facts: int, vocabulary: TaskVocabulary) -> Story:
        """Draw a story that asks for the first chains, and in the other question for as many of the
        next ones. No further draw is needed, since places and keys are random already.
        """
        chains = num_facts // self.hops
        keys = distinct_rows(rng, num_facts, vocabulary.keys, self.key_tokens).reshape(
            chains, self.hops, self.key_tokens
        )
        shape = (chains, self._values_per_chain, self.value_tokens)
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

    def _query(
        self, vocabulary: TaskVocabulary, keys: Tokens, values: Tokens, chains: range
    ) -> Query:
        """Return the question about `chains`; `keys` are [chains, hops, key_tokens], `values`
        [chains, 1 or hops, value_tokens], the last fact of a chain first.
        """
        given = keys[chains, -1].ravel()
        question = np.concatenate([[vocabulary.question], given, [vocabulary.newline]])
        asked_first = keys[:, ::-1][:, : self._values_per_chain]
        marks = np.full_like(asked_first[..., :1], vocabulary.equals)
        answers = np.concatenate([asked_first, marks, values[:, ::-1]], axis=2)[chains]
        mask = np.zeros(answers.shape, bool)
        mask[..., self.key_tokens + 1 :] = True
        needed = [
            chain * self.hops + fact for chain in chains for fact in reversed(range(self.hops))
        ]
        return Query(question, answers.ravel(), mask.ravel(), needed, self.hops)


def key_value(vocabulary: TaskVocabulary, key: Tokens, value: Tokens) -> Tokens:
    """Return the tokens of `key = value`."""
    return np.concatenate([key, [vocabulary.equals], value])
