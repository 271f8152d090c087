"""`Neighbours`: lists whose items are spread over the text; the question names items, the answers
are what stands next in the same list.

    planted  k1 = x1 .. k2 = y1 .. k1 = x2 .. k1 = x3 .. k2 = y2 ..
    asked    ? x1 y2 \\n       horizon  x1 = x2  y2 = y3

A fact holds the name of its list and one item. The fact of the named item is found by its words;
that of the next item shares only the list's name with it, which the question does not say, so it
takes a second step.
"""

import numpy as np
from pydantic import Field, PositiveInt

from mc_ds.tasks.planting import Family, Query, Story, Tokens, distinct_rows
from mc_ds.tasks.recall import key_value
from mc_ds.tasks.vocabulary import TaskVocabulary


class Neighbours(Family):
    """Lists of items, planted in reading order. Names and items have `key_tokens` tokens each."""

    items: int = Field(default=3, ge=2)
    """Number of items of a list."""
    questions: PositiveInt = 3
    """Number of lists that a sequence asks for."""

    @property
    def group_size(self) -> int:
        """The number of facts of a list."""
        return self.items

    @property
    def in_reading_order(self) -> bool:
        """True: the order of a list is that of the text."""
        return True

    @property
    def min_facts(self) -> int:
        """The number of facts of all lists asked for."""
        return self.questions * self.items

    @property
    def fact_tokens(self) -> int:
        """The length of name, mark and item."""
        return 2 * self.key_tokens + 1

    @property
    def question_tokens(self) -> int:
        """The length of the items and the two marks around them."""
        return 2 + self.questions * self.key_tokens

    @property
    def horizon_tokens(self) -> int:
        """The length of all answers: per list the item, a mark and the next item."""
        return self.questions * self.fact_tokens

    def num_keys(self, num_facts: int) -> int:
        """Return the number of names and items, all of which differ."""
        return num_facts // self.items + num_facts

    def draw(self, rng: np.random.Generator, num_facts: int, vocabulary: TaskVocabulary) -> Story:
        """Draw a story that asks for the first lists, and in the other question for as many of the
        next ones.
        """
        lists = num_facts // self.items
        keys = distinct_rows(rng, self.num_keys(num_facts), vocabulary.keys, self.key_tokens)
        names, items = keys[:lists], keys[lists:]
        facts = [key_value(vocabulary, names[i // self.items], items[i]) for i in range(num_facts)]
        asked = np.arange(lists) * self.items + rng.integers(self.items - 1, size=lists)
        first, second = np.split(asked[: 2 * self.questions], [self.questions])
        return Story(
            facts,
            keys=np.unique(keys),
            asked=self._query(vocabulary, items, first),
            other=self._query(vocabulary, items, second) if len(second) == len(first) else None,
        )

    def _query(self, vocabulary: TaskVocabulary, items: Tokens, asked: Tokens) -> Query:
        """Return the question about what follows the facts numbered `asked`."""
        question = np.concatenate(
            [[vocabulary.question], items[asked].ravel(), [vocabulary.newline]]
        )
        answers = [key_value(vocabulary, items[i], items[i + 1]) for i in asked]
        mask = np.tile([False] * (self.key_tokens + 1) + [True] * self.key_tokens, len(asked))
        needed = np.stack([asked, asked + 1], axis=1).ravel().tolist()
        return Query(question, np.concatenate(answers), mask, needed, hops=2)
