"""Families of RULER other than `Chains`: several values of one key, and the most frequent words of
a list.

    MultiValue    planted  k1 = a b c d .. k1 = e f g h ..
                  asked    ? k1 \\n       horizon  k1 = a b c d  k1 = e f g h  ..
    CommonWords   planted  = w1 .. = w2 .. = w1 ..
                  asked    ? = \\n        horizon  = w1 = w2 = w3

Source: RULER (Hsieh et al., arXiv:2404.06654), in the project's `key = value` format.
"""

import numpy as np
from pydantic import Field, PositiveInt

from mc_ds.tasks.planting import Family, Query, Story, Tokens, distinct_rows
from mc_ds.tasks.recall import key_value
from mc_ds.tasks.vocabulary import TaskVocabulary


class MultiValue(Family):
    """Keys with several values, each in its own fact; the question asks for all values of one key,
    in reading order.
    """

    values: int = Field(default=3, ge=2)
    """Number of values per key."""
    value_tokens: PositiveInt = 4
    """Number of letters of a value."""

    @property
    def group_size(self) -> int:
        """The number of facts of a key."""
        return self.values

    @property
    def in_reading_order(self) -> bool:
        """True: the answers are in the order of the text."""
        return True

    @property
    def min_facts(self) -> int:
        """The number of facts of one key."""
        return self.values

    @property
    def fact_tokens(self) -> int:
        """The length of key, mark and value."""
        return self.key_tokens + 1 + self.value_tokens

    @property
    def question_tokens(self) -> int:
        """The length of the key and the two marks around it."""
        return 2 + self.key_tokens

    @property
    def horizon_tokens(self) -> int:
        """The length of all facts of one key."""
        return self.values * self.fact_tokens

    def num_keys(self, num_facts: int) -> int:
        """Return the number of groups: each has one key."""
        return num_facts // self.values

    def draw(self, rng: np.random.Generator, num_facts: int, vocabulary: TaskVocabulary) -> Story:
        """Draw a story that asks for the first key, and in the other question for the second."""
        keys = distinct_rows(rng, num_facts // self.values, vocabulary.keys, self.key_tokens)
        letters = vocabulary.letters[
            rng.integers(len(vocabulary.letters), size=(num_facts, self.value_tokens))
        ]
        facts = [
            key_value(vocabulary, keys[i // self.values], letters[i]) for i in range(num_facts)
        ]
        asked = self._query(vocabulary, keys[0], facts, 0)
        other = self._query(vocabulary, keys[1], facts, self.values) if len(keys) > 1 else None
        return Story(facts, keys=np.unique(keys), asked=asked, other=other)

    def _query(
        self, vocabulary: TaskVocabulary, key: Tokens, facts: list[Tokens], first: int
    ) -> Query:
        question = np.concatenate([[vocabulary.question], key, [vocabulary.newline]])
        mask = np.tile([False] * (self.key_tokens + 1) + [True] * self.value_tokens, self.values)
        needed = range(first, first + self.values)
        return Query(question, np.concatenate([facts[i] for i in needed]), mask, needed)


class CommonWords(Family):
    """A list whose items are spread over the text; the question asks for its most frequent words.

    At most half of the items are the common words, each more frequent than the next; all other
    words occur once.
    """

    words: PositiveInt = 3
    """Number of common words, of `key_tokens` tokens each."""

    @property
    def _unit(self) -> int:
        """Sum of the ratio words : words - 1 : ... : 1 in which the common words occur."""
        return self.words * (self.words + 1) // 2

    @property
    def min_facts(self) -> int:
        """The number of items at which the rarest common word occurs twice."""
        return 4 * self._unit

    @property
    def fact_tokens(self) -> int:
        """The length of mark and word."""
        return 1 + self.key_tokens

    @property
    def question_tokens(self) -> int:
        """The length of the three marks."""
        return 3

    @property
    def horizon_tokens(self) -> int:
        """The total length of one item for each common word."""
        return self.words * self.fact_tokens

    def copies(self, num_facts: int) -> Tokens:
        """Return how often each common word occurs among `num_facts` items, [words]."""
        return num_facts // 2 // self._unit * np.arange(self.words, 0, -1)

    def num_keys(self, num_facts: int) -> int:
        """Return the number of distinct words, common or not."""
        return self.words + num_facts - int(self.copies(num_facts).sum())

    def draw(self, rng: np.random.Generator, num_facts: int, vocabulary: TaskVocabulary) -> Story:
        """Draw the list. There is no second list and so no other question. All words of the
        alphabet count as keys, so that none in the text looks like an item.
        """
        copies = self.copies(num_facts)
        words = distinct_rows(rng, self.num_keys(num_facts), vocabulary.keys, self.key_tokens)
        items = np.insert(words, 0, vocabulary.equals, axis=1)
        facts = np.repeat(
            items,
            np.concatenate([copies, np.ones(len(words) - self.words, dtype=np.int64)]),
            axis=0,
        )
        question = np.array([vocabulary.question, vocabulary.equals, vocabulary.newline])
        mask = np.tile([False] + [True] * self.key_tokens, self.words)
        query = Query(question, items[: self.words].ravel(), mask, range(int(copies.sum())))
        return Story(list(facts), keys=vocabulary.keys, asked=query, other=None)
