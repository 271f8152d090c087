"""`ByMeaning`: facts `word = value` that are asked for by a synonym of the word or by its gloss.

    planted   car = a b c d
    synonym   ? automobile ? feline ? .. \\n                   horizon  car = a b c d  cat = ..
    gloss     ? a motor vehicle with four wheels ? .. \\n      horizon  car = a b c d  cat = ..

Retrieval by words is at chance: a token of the question occurs in no planted word, and the facts
are in random blocks, so a match with the other text says nothing about which fact is asked for. The
horizon names the planted words, so its loss depends on whether the facts are open, and not on
whether the backbone knows the synonyms; only the choice of a context needs their meaning.

Words come from WordNet (`wordnet`). Every meaning belongs either to training or to what is held
out, and every word to one meaning.
"""

import hashlib
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import permutations
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from mc_ds.config import ConfigError
from mc_ds.config.types import UserPath
from mc_ds.data.tokenizer import Tokenizer
from mc_ds.tasks.planting import Query, Story, Tokens
from mc_ds.tasks.recall import Questions, key_value
from mc_ds.tasks.vocabulary import Paraphrase, TaskVocabulary
from mc_ds.tasks.wordnet import DEBIAN, FILES, Meaning, read_meanings

HELD_OUT_SHARE = 4
"""One meaning of this many is held out."""
ATTEMPTS = 20
"""Number of random choices of words that are tried before the vocabulary counts as too small."""
_SAME_BEGINNING = 4
_SAME_LETTERS = 0.75


class ByMeaning(Questions):
    """Words with values, asked for by another expression of the same meaning."""

    by: Literal["synonym", "gloss"] = "synonym"
    """What a question says instead of the planted word."""
    word_tokens: PositiveInt = 3
    """Largest number of tokens of a planted word; words with more are left out."""
    asked_tokens: PositiveInt = 4
    """Largest number of tokens of a synonym or gloss; longer ones are left out."""
    wordnet: UserPath | None = None
    """Folder of WordNet's database files."""
    held_out: bool = True
    """Use the held-out meanings; False: those for training."""

    @property
    def min_facts(self) -> int:
        """The number of facts asked for."""
        return self.questions

    @property
    def fact_tokens(self) -> int:
        """The length of the longest word, the mark and the value."""
        return self.word_tokens + 1 + self.value_tokens

    @property
    def question_tokens(self) -> int:
        """The length of the longest expressions, each after a mark, and the mark at the end."""
        return self.questions * (1 + self.asked_tokens) + 1

    @property
    def horizon_tokens(self) -> int:
        """The length of the longest facts asked for."""
        return self.questions * self.fact_tokens

    def num_keys(self, num_facts: int) -> int:
        """Return 0: words are the keys."""
        return 0

    def require(self) -> None:
        """Raise ConfigError unless `wordnet` is a folder with the database files."""
        folder = self._folder
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"wordnet: {folder} has no {missing[0]}: give a folder with WordNet's database"
                f" files, such as {DEBIAN}"
            )

    @property
    def _folder(self) -> Path:
        if self.wordnet is None:
            raise ConfigError(
                f"questions by {self.by} need WordNet: give the folder of its database files, such"
                f" as {DEBIAN} (data.wordnet in training, --wordnet in evaluation)"
            )
        return Path(self.wordnet)

    def paraphrases(self, tokenizer: Tokenizer) -> Sequence[Sequence[Paraphrase]]:
        """Return the pairs of planted word and question, by meaning, that are short enough and have
        no token in common.
        """
        meanings = [
            meaning
            for meaning in read_meanings(self._folder)
            if is_held_out(meaning) == self.held_out
        ]
        texts = [list(self._texts(meaning)) for meaning in meanings]
        distinct = sorted({text for pairs in texts for pair in pairs for text in pair})
        encoded = tokenizer.encode_many([f" {text}" for text in distinct])
        tokens = {
            text: np.array(ids, dtype=np.int64) for text, ids in zip(distinct, encoded, strict=True)
        }
        found = (
            [Paraphrase(tokens[planted], tokens[asked]) for planted, asked in pairs]
            for pairs in texts
        )
        usable = ([pair for pair in pairs if self._is_usable(pair)] for pairs in found)
        return [pairs for pairs in usable if pairs]

    def _texts(self, meaning: Meaning) -> Iterator[tuple[str, str]]:
        """Yield pairs of a word and an expression for it that has no word of similar spelling."""
        if self.by == "synonym":
            yield from (
                (word, other)
                for word, other in permutations(meaning.words, 2)
                if not _same_beginning(word, other)
                and SequenceMatcher(None, word, other).ratio() < _SAME_LETTERS
            )
        else:
            defining = meaning.gloss.split()
            yield from (
                (word, meaning.gloss)
                for word in meaning.words
                if not any(_same_beginning(word, other) for other in defining)
            )

    def _is_usable(self, pair: Paraphrase) -> bool:
        return (
            len(pair.planted) <= self.word_tokens
            and len(pair.asked) <= self.asked_tokens
            and not np.isin(pair.planted, pair.asked).any()
        )

    def draw(self, rng: np.random.Generator, num_facts: int, vocabulary: TaskVocabulary) -> Story:
        """Draw a story that asks for the first words, and in the other question for as many of the
        next ones. Raises ConfigError if the vocabulary has too few words.
        """
        count = self._count(rng, num_facts)
        asked = [range(count), *([range(count, 2 * count)] if 2 * count <= num_facts else [])]
        pairs = self._choose(rng, num_facts, asked[-1].stop, vocabulary.paraphrases)
        letters = vocabulary.letters[
            rng.integers(len(vocabulary.letters), size=(num_facts, self.value_tokens))
        ]
        facts = [
            key_value(vocabulary, pair.planted, value)
            for pair, value in zip(pairs, letters, strict=True)
        ]
        queries = [self._query(vocabulary, pairs, facts, numbers) for numbers in asked]
        return Story(
            facts,
            keys=np.unique(np.concatenate([pair.planted for pair in pairs])),
            asked=queries[0],
            other=queries[1] if len(queries) > 1 else None,
        )

    def _choose(
        self,
        rng: np.random.Generator,
        count: int,
        asked: int,
        paraphrases: Sequence[Sequence[Paraphrase]],
    ) -> list[Paraphrase]:
        """Draw `count` pairs of distinct meanings. No token of the first `asked` questions occurs
        in any of the planted words.
        """
        most = 0
        for _ in range(ATTEMPTS):
            chosen: list[Paraphrase] = []
            in_questions: set[int] = set()
            in_words: set[int] = set()
            for number in rng.permutation(len(paraphrases)):
                pairs = paraphrases[number]
                pair = pairs[int(rng.integers(len(pairs)))]
                word = set(pair.planted.tolist())
                question = set(pair.asked.tolist()) if len(chosen) < asked else set()
                if word & in_questions or question & in_words:
                    continue
                chosen.append(pair)
                in_questions |= question
                in_words |= word
                if len(chosen) == count:
                    return chosen
            most = max(most, len(chosen))
        raise ConfigError(
            f"{count} facts asked by {self.by} need as many words without a token of the questions,"
            f" but only {most} of {len(paraphrases)} meanings are left: plant fewer facts"
            " (data.recall.facts_by_stage, a shorter history or a smaller budget), or use a"
            " tokenizer with a larger vocabulary"
        )

    def _query(
        self,
        vocabulary: TaskVocabulary,
        pairs: Sequence[Paraphrase],
        facts: Sequence[Tokens],
        numbers: range,
    ) -> Query:
        question = np.concatenate(
            [part for number in numbers for part in ([vocabulary.question], pairs[number].asked)]
            + [[vocabulary.newline]]
        )
        mask = np.concatenate(
            [
                np.arange(len(facts[number])) > len(pairs[number].planted)  # after the mark
                for number in numbers
            ]
        )
        return Query(question, np.concatenate([facts[n] for n in numbers]), mask, numbers)


def is_held_out(meaning: Meaning) -> bool:
    """Return whether a meaning is held out: a function of its words, so that it does not depend on
    the tokenizer or on other meanings.
    """
    digest = hashlib.sha256(" ".join(sorted(meaning.words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def _same_beginning(word: str, other: str) -> bool:
    return word[:_SAME_BEGINNING] == other[:_SAME_BEGINNING]
