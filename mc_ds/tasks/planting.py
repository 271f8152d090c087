"""`PlantedTask`: facts planted in real text, a question about some of them, their answers as the
horizon.

    0 ........... head ........... | .. tail .. [? k1 k2 k3 \\n] | k1 = a b c d  k2 ...  | text
    text, one fact in each of some | text; last is T-h           | targets T-h+1 .. T, h in all
    blocks of K                    |                             |

A `Family` decides what is planted and asked. This module decides where, and removes what else in
the text looks like a fact. A fact lies completely inside one aligned block of the head, at most one
per block. If the answers are shorter than the horizon, text of weight zero follows.

Legend: T tokens, K block size, h horizon tokens, n facts.
"""

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from mc_ds.config import ConfigError, MCConfig
from mc_ds.config.errors import Settings
from mc_ds.data.sampling.windows import WindowSampler, derive_key
from mc_ds.data.shards import TokenShards
from mc_ds.data.tokenizer import Tokenizer
from mc_ds.tasks.base import FINAL_STAGE, TaskSample, errors_of
from mc_ds.tasks.vocabulary import Paraphrase, TaskVocabulary

Tokens = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Query:
    """A question about some facts, and its answers."""

    question: Tokens
    """[q] tokens directly before the horizon."""
    horizon: Tokens
    """[m] tokens of the horizon, which contain the answers."""
    mask: NDArray[np.bool_]
    """[m], True for the answers."""
    facts: Sequence[int]
    """Numbers of the facts needed, in the order in which the answers need them."""
    hops: int = 1
    """Number of facts per answer, first the one that the question names."""


@dataclass(frozen=True, eq=False)
class Story:
    """The facts and questions of one sequence."""

    facts: Sequence[Tokens]
    """n facts; those of a group are adjacent."""
    keys: Tokens
    """Tokens of the keys. `equals` marks of the original text beside one of them are removed,
    because they would look like a fact.
    """
    asked: Query
    other: Query | None
    """A question of the same form about other facts; None if too few facts are left."""


class Family(Settings, ABC):
    """A kind of fact and question. Sizes are in tokens."""

    key_tokens: PositiveInt = 1
    """Number of tokens of a key. Their sequence identifies a fact; a single token may occur in
    several keys.
    """

    @property
    def group_size(self) -> int:
        """Number of facts that belong together; the number of facts is a multiple of it."""
        return 1

    @property
    def in_reading_order(self) -> bool:
        """True if the facts of a group are planted in the order in which the story lists them."""
        return False

    @property
    @abstractmethod
    def min_facts(self) -> int:
        """Number of facts that one question needs."""

    @property
    @abstractmethod
    def fact_tokens(self) -> int:
        """Length of the longest fact."""

    @property
    @abstractmethod
    def question_tokens(self) -> int:
        """Length of the question, including its marks."""

    @property
    @abstractmethod
    def horizon_tokens(self) -> int:
        """Length of the horizon that the answers need."""

    @abstractmethod
    def num_keys(self, num_facts: int) -> int:
        """Return the number of distinct keys in a story with `num_facts` facts."""

    def require(self) -> None:
        """Raise ConfigError if files that the family reads are missing."""

    def paraphrases(self, tokenizer: Tokenizer) -> Sequence[Sequence[Paraphrase]]:
        """Return, by meaning, the words to plant and expressions that ask for them; none by
        default. Raises ConfigError if they cannot be read.
        """
        return ()

    @abstractmethod
    def draw(self, rng: np.random.Generator, num_facts: int, vocabulary: TaskVocabulary) -> Story:
        """Return a random story."""


class PlantedTask:
    """A family of facts planted in the text of `shards`, at the lengths (T, K, h, tail) of `mc`.

    `facts_by_stage` gives the number of facts at each stage of a curriculum; evaluations use the
    last. With `planted`, each stage fills that many places by repeating facts. The asked facts are
    repeated last, because a repeated fact is easier to recall. Samples depend on the task's name,
    the seed and the text, so training and held-out text never share facts. Raises ConfigError if
    lengths do not fit.
    """

    def __init__(
        self,
        name: str,
        family: Family,
        *,
        shards: TokenShards,
        vocabulary: TaskVocabulary,
        mc: MCConfig,
        facts_by_stage: Sequence[int],
        seed: int,
        planted: int | None = None,
    ) -> None:
        check_fit(name, family, mc, facts_by_stage, planted, alphabet=len(vocabulary.keys))
        self.name = name
        self.family = family
        self.facts_by_stage = tuple(facts_by_stage)
        self.planted = planted
        self._shards, self._vocabulary = shards, vocabulary
        self._seq_len, self._block_size, self._blocks = (
            mc.seq_len,
            mc.block_size,
            mc.geometry.head_nodes[1],
        )
        self._horizon_tokens = mc.horizon_tokens
        self._key = derive_key(
            seed, _digest(name), _digest(*(shard.sha256 for shard in shards.index.shards))
        )
        self._windows = WindowSampler(
            len(shards), window=mc.seq_len + 1, stride=mc.seq_len, seed=self._key
        )
        # Only a draw tells whether the vocabulary has enough words.
        self._draw(np.random.default_rng(self._key), max(facts_by_stage))

    @property
    def horizon_tokens(self) -> int:
        """Length of the horizon that the answers need, at most h."""
        return self.family.horizon_tokens

    def sample(self, index: int, stage: int = FINAL_STAGE) -> TaskSample:
        """Return sequence `index` of `stage`. The text is the same in every stage."""
        rng = np.random.default_rng(derive_key(self._key, index))
        num_facts = self.facts_by_stage[min(stage, len(self.facts_by_stage) - 1)]
        story = self._draw(rng, num_facts)
        text = self._shards.window(self._windows.start(index), self._seq_len + 1)
        facts = [story.facts[fact] for fact in self._repeated(len(story.facts))]
        spans = self._places(rng, facts)
        self._plant(text, facts, story.keys, spans)
        spans = spans[: len(story.facts)]
        other = None if story.other is None else self._ask(text, story.other, spans, None)
        return self._ask(text, story.asked, spans, other)

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how many passes over the text the first `samples` sequences make, keyed by the
        task's name.
        """
        return {self.name: samples / self._windows.windows_per_epoch}

    def _draw(self, rng: np.random.Generator, num_facts: int) -> Story:
        with errors_of(self.name):
            return self.family.draw(rng, num_facts, self._vocabulary)

    def _repeated(self, num_facts: int) -> list[int]:
        """Return the indices of the facts to plant, one per place: each fact once, then whole
        groups again, starting with the last group.
        """
        group = self.family.group_size
        groups = num_facts // group
        again = (
            (groups - 1 - turn % groups) * group + fact
            for turn in itertools.count()
            for fact in range(group)
        )
        return [
            *range(num_facts),
            *itertools.islice(again, (self.planted or num_facts) - num_facts),
        ]

    def _places(self, rng: np.random.Generator, facts: Sequence[Tokens]) -> Tokens:
        """Return the token ranges [n, 2] of the facts: random offsets in distinct random blocks."""
        lengths = np.array([len(fact) for fact in facts])
        blocks = rng.choice(self._blocks, len(lengths), replace=False)
        if self.family.in_reading_order:
            blocks = np.sort(blocks.reshape(-1, self.family.group_size), axis=1).ravel()
        starts = blocks * self._block_size + rng.integers(
            0, self._block_size - lengths, endpoint=True
        )
        return np.stack([starts, starts + lengths], axis=1)

    def _plant(self, text: Tokens, facts: Sequence[Tokens], keys: Tokens, spans: Tokens) -> None:
        """Write the facts into `text` [T + 1]. `equals` marks of the original text beside a token
        of a key become line breaks.
        """
        planted = np.zeros(len(text), dtype=np.bool_)
        for fact, (start, end) in zip(facts, spans, strict=True):
            text[start:end] = fact
            planted[start:end] = True
        beside = np.zeros(len(text) + 2, dtype=np.bool_)
        is_key = np.isin(text, keys)
        beside[:-2] |= is_key
        beside[2:] |= is_key
        text[(text == self._vocabulary.equals) & ~planted & beside[1:-1]] = self._vocabulary.newline

    def _ask(
        self, history: Tokens, query: Query, spans: Tokens, other: TaskSample | None
    ) -> TaskSample:
        """Return the sample that asks `query` about `history` [T + 1]."""
        tokens = history.copy()
        horizon_start = self._seq_len - self._horizon_tokens + 1
        tokens[horizon_start - len(query.question) : horizon_start] = query.question
        tokens[horizon_start : horizon_start + len(query.horizon)] = query.horizon
        horizon_mask = np.zeros(self._horizon_tokens, dtype=np.float32)
        horizon_mask[: len(query.mask)] = query.mask
        distractors = np.delete(spans, query.facts, axis=0)
        return TaskSample(
            tokens,
            horizon_mask,
            spans[list(query.facts)],
            distractors[np.argsort(distractors[:, 0])],
            other,
            query.hops,
        )


def distinct_rows(rng: np.random.Generator, count: int, symbols: Tokens, width: int) -> Tokens:
    """Draw [count, width] distinct rows of `symbols`, which must be distinct themselves. Raises
    ValueError if there are fewer such rows.
    """
    codes = rng.choice(len(symbols) ** width, count, replace=False)
    return symbols[codes[:, None] // len(symbols) ** np.arange(width)[::-1] % len(symbols)]


def _digest(*names: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:8], "big")


def check_fit(
    name: str,
    family: Family,
    mc: MCConfig,
    facts_by_stage: Sequence[int],
    planted: int | None,
    *,
    alphabet: int,
) -> None:
    """Raise ConfigError if the facts do not fit into the lengths of `mc`, or an alphabet of
    `alphabet` pieces gives too few keys. Needs no text.
    """
    blocks = mc.geometry.head_nodes[1]
    _check_lengths(name, family, mc)
    if planted is not None:
        _check_planted(name, family, planted, facts_by_stage, blocks=blocks)
    for num_facts in facts_by_stage or [0]:
        _check_facts(name, family, num_facts, blocks=blocks, alphabet=alphabet)


def _check_lengths(name: str, family: Family, mc: MCConfig) -> None:
    if mc.horizon_tokens < family.horizon_tokens:
        raise ConfigError(
            f"task {name}: mc.horizon_tokens = {mc.horizon_tokens} cannot hold its answers: use at"
            f" least {family.horizon_tokens}"
        )
    tail = family.question_tokens + mc.horizon_tokens
    if mc.recent_tokens < tail:
        raise ConfigError(
            f"task {name}: mc.recent_tokens = {mc.recent_tokens} cannot hold the question"
            f" ({family.question_tokens}) and the horizon ({mc.horizon_tokens}): use at least"
            f" {tail}"
        )
    if mc.block_size < family.fact_tokens:
        raise ConfigError(
            f"task {name}: a fact of {family.fact_tokens} tokens does not fit a block of"
            f" mc.block_size = {mc.block_size}: use larger blocks, or shorter keys and values"
        )


def _check_planted(
    name: str, family: Family, planted: int, facts_by_stage: Sequence[int], *, blocks: int
) -> None:
    most = max([family.min_facts, *facts_by_stage])
    if not most <= planted <= blocks or planted % family.group_size:
        raise ConfigError(
            f"task {name}: planted = {planted} does not fit: use {most} (largest number of facts of"
            f" a stage) to {blocks} (blocks of the head)"
            + (f", in steps of {family.group_size}" if family.group_size > 1 else "")
        )


def _check_facts(name: str, family: Family, num_facts: int, *, blocks: int, alphabet: int) -> None:
    group = family.group_size
    most = blocks // group * group
    if not family.min_facts <= num_facts <= most or num_facts % group:
        multiple = f" in steps of {group}" if group > 1 else ""
        raise ConfigError(
            f"task {name}: {num_facts} facts do not fit: use {family.min_facts} to {most}{multiple}"
            f" (at most one in each of the {blocks} blocks of the head)"
        )
    keys, possible = family.num_keys(num_facts), alphabet**family.key_tokens
    if keys > possible or possible >= 2**63:
        raise ConfigError(
            f"task {name}: {num_facts} facts need {keys} keys, but keys of length"
            f" {family.key_tokens} from {alphabet} pieces allow {possible}: change num_keys ="
            f" {alphabet} or key_tokens = {family.key_tokens}"
        )
