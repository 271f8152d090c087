"""Tasks can be answered from what is visible, and only from the facts they name; a reader that
knows no spans checks it.
"""

import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mc_ds.config import ConfigError, MCConfig
from mc_ds.data import (
    MicroBatchDataset,
    MicroStep,
    ShardWriter,
    StdlibCorpus,
    Tokenizer,
    TokenShards,
    train_tokenizer,
)
from mc_ds.geometry import Geometry
from mc_ds.tasks import (
    FAMILIES,
    FINAL_STAGE,
    CorpusTask,
    MixedSource,
    PlantedTask,
    TaskSample,
    TaskSource,
    TaskVocabulary,
    make_family,
    make_task,
    open_blocks,
    too_few_facts,
)

Tokens = NDArray[np.int64]
NUM_FACTS = 48
BY_KEY = [name for name in FAMILIES if name not in ("synonym", "gloss")]
"""Families that ask for a fact by its key; test_meaning.py covers the others."""
WITH_OTHER = [name for name in BY_KEY if name not in ("niah_single", "common_words")]


def lengths(**changes: Any) -> MCConfig:
    """T = 512, K = 8: 56 head blocks, of which W = 302 opens 26; the horizon holds the longest
    answers, those of three long keys.
    """
    base = dict(
        seq_len=512,
        block_size=8,
        max_lod=1,
        train_wc_length=302,
        recent_tokens=64,
        horizon_tokens=24,
    )
    return MCConfig(**{**base, **changes})


def write_shards(folder: Path, tokenizer: Tokenizer, documents: Sequence[Tokens]) -> TokenShards:
    with ShardWriter(
        folder, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    ) as writer:
        for document in documents:
            writer.append(document)
    return TokenShards(folder)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(StdlibCorpus(val_fraction=0.05).documents("val"))[:30]


@pytest.fixture(scope="module")
def tokenizer(documents: list[str]) -> Tokenizer:
    return train_tokenizer(documents, vocab_size=512)


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, documents: list[str]
) -> TokenShards:
    return write_shards(
        tmp_path_factory.mktemp("text") / "shards",
        tokenizer,
        [tokenizer.encode_document(text) for text in documents],
    )


@pytest.fixture(scope="module")
def marks_and_keys(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> TokenShards:
    """Text that says `key =` and `= key` at every turn: the worst background for facts to stay
    unique in.
    """
    vocabulary = TaskVocabulary.of(tokenizer)
    rng = np.random.default_rng(0)
    text = np.where(
        rng.random(20_000) < 0.5, vocabulary.equals, rng.choice(vocabulary.keys, 20_000)
    )
    return write_shards(tmp_path_factory.mktemp("marks") / "shards", tokenizer, [text])


@pytest.fixture
def make(shards: TokenShards, tokenizer: Tokenizer) -> Any:
    def make(
        name: str,
        mc: MCConfig | None = None,
        seed: int = 0,
        text: TokenShards = shards,
        **options: Any,
    ) -> Any:
        if name not in ("corpus", "niah_single"):
            options = {"facts_by_stage": [NUM_FACTS], **options}
        return make_task(
            name, shards=text, tokenizer=tokenizer, mc=mc or lengths(), seed=seed, **options
        )

    return make


class Reader:
    """Answers questions from the visible tokens alone, [T - h + 1], by what the formats say;
    knows nothing of blocks and spans.
    """

    def __init__(self, visible: Tokens, question_tokens: int, vocabulary: TaskVocabulary) -> None:
        self.vocabulary = vocabulary
        self.history, question = np.split(visible, [len(visible) - question_tokens])
        assert question[0] == vocabulary.question
        assert question[-1] == vocabulary.newline
        self.asked = question[1:-1]
        self.read: list[tuple[int, int]] = []

    def facts_of(self, key: Tokens) -> list[int]:
        """Where the history says `key =`."""
        pattern = np.array([*key, self.vocabulary.equals])
        windows = np.lib.stride_tricks.sliding_window_view(self.history, len(pattern))
        return [int(i) for i in np.flatnonzero((windows == pattern).all(axis=1))]

    def values(
        self, key: Tokens, value_tokens: int, hops: int = 1, every: bool = False
    ) -> list[Tokens]:
        """Values of `key`, in reading order, following its chain where the value is another key,
        or (`every`) ends with one.
        """
        values = []
        for start in self.facts_of(key):
            begin = start + len(key) + 1
            middle = begin + (value_tokens if hops == 1 or every else 0)
            end = middle + (len(key) if hops > 1 else 0)
            self.read.append((start, end))
            value, named = self.history[begin:middle], self.history[middle:end]
            assert np.isin(value, self.vocabulary.letters).all()
            assert np.isin(named, self.vocabulary.keys).all()
            values += [value] if len(value) else []
            values += self.values(named, value_tokens, hops - 1, every) if hops > 1 else []
        return values

    def next_item(self, item: Tokens) -> Tokens:
        """What stands next in the list of `item`, after the fact `name = item`."""
        width = len(item)
        facts = [
            (int(i) - width, self.history[i - width : i], self.history[i + 1 : i + 1 + width])
            for i in np.flatnonzero(self.history == self.vocabulary.equals)
            if i >= width and i + width < len(self.history)
        ]
        ((place, name, _),) = [fact for fact in facts if np.array_equal(fact[2], item)]
        start, _, after = next(
            fact for fact in facts if fact[0] > place and np.array_equal(fact[1], name)
        )
        self.read += [(first, first + 2 * width + 1) for first in (place, start)]
        return np.asarray(after)

    def words(self, key_tokens: int) -> list[tuple[Tokens, int]]:
        """Items `= word` with their counts, the most frequent first."""
        found = [
            self.history[i + 1 : i + 1 + key_tokens]
            for i in np.flatnonzero(self.history[: -1 - key_tokens] == self.vocabulary.equals)
            if np.isin(self.history[i + 1 : i + 1 + key_tokens], self.vocabulary.keys).all()
        ]
        return [
            (np.array(word), count)
            for word, count in Counter(tuple(word) for word in found).most_common()
        ]


def answers(sample: TaskSample) -> list[int]:
    """The tokens that the mask selects: target i of the horizon is token T - h + 1 + i."""
    seq_len, horizon = len(sample.tokens) - 1, len(sample.horizon_mask)
    return [
        int(sample.tokens[seq_len - horizon + 1 + i])
        for i in range(horizon)
        if sample.horizon_mask[i] == 1
    ]


def visible(sample: TaskSample) -> Tokens:
    return sample.tokens[: len(sample.tokens) - len(sample.horizon_mask)]


def check_answers(task: PlantedTask, sample: TaskSample, vocabulary: TaskVocabulary) -> None:
    """The reader finds the answers, and what it read are the spans that matter, in that order."""
    family: Any = task.family
    reader = Reader(visible(sample), family.question_tokens, vocabulary)
    if task.name == "common_words":
        ranking = reader.words(family.key_tokens)
        counts = [count for _, count in ranking]
        assert len(set(counts[: family.words + 1])) == family.words + 1, (
            "the order of the common words is no matter of taste"
        )
        assert answers(sample) == [token for word, _ in ranking[: family.words] for token in word]
        assert len(sample.spans) == sum(counts[: family.words])
        return
    if task.name == "neighbour":
        items = reader.asked.reshape(family.questions, family.key_tokens)
        assert answers(sample) == [token for item in items for token in reader.next_item(item)]
        assert sample.hops == 2
        assert sample.spans.tolist() == [list(span) for span in reader.read]
        return
    if task.name == "niah_multivalue":
        found = reader.values(reader.asked, family.value_tokens)
        assert len(found) == family.values
    else:
        keys = reader.asked.reshape(family.questions, family.key_tokens)
        found = [
            part
            for key in keys
            for part in reader.values(key, family.value_tokens, family.hops, family.values == "all")
        ]
        assert len(found) == family.questions * (family.hops if family.values == "all" else 1), (
            "each asked fact is there once"
        )
    assert answers(sample) == [token for part in found for token in part]
    assert sample.spans.tolist() == [list(span) for span in reader.read]


def check_places(task: PlantedTask, sample: TaskSample, mc: MCConfig, num_facts: int) -> None:
    """Every fact lies wholly inside one block of the head, and no block holds two."""
    places = np.concatenate([sample.spans, sample.distractors])
    assert len(places) == num_facts
    assert (places[:, 0] < places[:, 1]).all()
    blocks = places[:, 0] // mc.block_size
    assert (blocks == (places[:, 1] - 1) // mc.block_size).all()
    assert len(set(blocks)) == num_facts
    assert blocks.min() >= 0
    assert places.max() <= mc.geometry.head_len
    assert (np.diff(sample.distractors[:, 0]) > 0).all()


@pytest.mark.parametrize("name", BY_KEY)
def test_the_visible_history_answers_the_question(
    name: str, make: Any, tokenizer: Tokenizer
) -> None:
    task, mc = make(name), lengths()
    for index in range(25):
        sample = task.sample(index)
        check_answers(task, sample, TaskVocabulary.of(tokenizer))
        check_places(task, sample, mc, 1 if name == "niah_single" else NUM_FACTS)
        assert sample.tokens.shape == (mc.seq_len + 1,)
        assert sample.horizon_mask.shape == (mc.horizon_tokens,)
        assert (sample.tokens.dtype, sample.horizon_mask.dtype, sample.spans.dtype) == (
            np.int64,
            np.float32,
            np.int64,
        )


@settings(max_examples=60, deadline=None)
@given(
    options=st.fixed_dictionaries(
        dict(
            questions=st.integers(1, 4),
            key_tokens=st.integers(1, 3),
            value_tokens=st.integers(2, 6),
            hops=st.integers(1, 3),
            values=st.sampled_from(["last", "all"]),
            definition_first=st.booleans(),
        )
    ),
    block_size=st.integers(13, 20),
    stray=st.integers(0, 9),
    spare=st.integers(0, 5),
    seed=st.integers(0, 2**32),
)
def test_chains_of_any_shape_can_be_answered_even_in_a_text_of_keys_and_marks(
    options: dict[str, Any],
    block_size: int,
    stray: int,
    spare: int,
    seed: int,
    marks_and_keys: TokenShards,
    tokenizer: Tokenizer,
) -> None:
    family: Any = make_family("recall", **options)
    horizon = family.horizon_tokens + spare
    recent = family.question_tokens + horizon
    mc = MCConfig(
        seq_len=24 * block_size + stray + recent,
        block_size=block_size,
        max_lod=1,
        train_wc_length=23 * block_size + stray + recent + 1,
        recent_tokens=recent,
        horizon_tokens=horizon,
    )
    task = make_task(
        "recall",
        shards=marks_and_keys,
        tokenizer=tokenizer,
        mc=mc,
        seed=seed,
        facts_by_stage=[24],
        **options,
    )
    sample = task.sample(0)
    check_answers(task, sample, TaskVocabulary.of(tokenizer))
    check_places(task, sample, mc, 24)
    if family.definition_first:
        chains = sample.spans[:, 0].reshape(family.questions, family.hops)[:, ::-1]
        assert (np.diff(chains, axis=1) > 0).all()


@pytest.mark.parametrize("name", ["common_words", "niah_multivalue", "neighbour"])
def test_the_other_families_stay_unambiguous_in_a_text_of_keys_and_marks(
    name: str, make: Any, marks_and_keys: TokenShards, tokenizer: Tokenizer
) -> None:
    for key_tokens in (1, 2):
        task = make(name, text=marks_and_keys, key_tokens=key_tokens)
        for index in range(5):
            check_answers(task, task.sample(index), TaskVocabulary.of(tokenizer))


@pytest.mark.parametrize("name", BY_KEY)
def test_real_text_then_the_question_in_the_tail_then_the_answers(
    name: str, make: Any, shards: TokenShards, tokenizer: Tokenizer
) -> None:
    task, mc = make(name), lengths()
    vocabulary = TaskVocabulary.of(tokenizer)
    text = shards.window(0, len(shards))
    for index in range(3):
        sample = task.sample(index)
        question_start = mc.seq_len - mc.horizon_tokens + 1 - task.family.question_tokens
        assert question_start >= mc.seq_len - mc.recent_tokens
        assert sample.tokens[question_start] == vocabulary.question
        assert sample.tokens[mc.seq_len - mc.horizon_tokens] == vocabulary.newline, (
            "the last visible token"
        )
        before = sample.tokens[mc.geometry.head_len : question_start]
        windows = np.lib.stride_tricks.sliding_window_view(text, len(before))
        differences = (windows != before).sum(axis=1).min()
        assert differences <= (before == vocabulary.newline).sum(), (
            "text of the corpus, but for marks beside keys"
        )
        assert sample.horizon_mask[task.horizon_tokens :].sum() == 0, (
            "what follows the answers does not count"
        )
        assert set(np.unique(sample.horizon_mask)) == {0, 1}


@pytest.mark.parametrize("name", WITH_OTHER)
def test_the_other_question_shares_the_history_and_asks_other_facts(
    name: str, make: Any, tokenizer: Tokenizer
) -> None:
    task, mc = make(name), lengths()
    for index in range(10):
        sample = task.sample(index)
        other = sample.other
        assert other is not None
        assert other.other is None
        question_start = mc.seq_len - mc.horizon_tokens + 1 - task.family.question_tokens
        assert (sample.tokens[:question_start] == other.tokens[:question_start]).all()
        assert (visible(sample) != visible(other)).any()
        assert not {tuple(span) for span in sample.spans} & {tuple(span) for span in other.spans}
        assert {tuple(span) for span in other.spans} <= {tuple(span) for span in sample.distractors}
        assert (sample.horizon_mask == other.horizon_mask).all()
        check_answers(task, other, TaskVocabulary.of(tokenizer))


def test_only_tasks_with_facts_to_spare_have_another_question(make: Any) -> None:
    assert make("niah_single").sample(0).other is None
    assert make("common_words").sample(0).other is None
    assert make("recall", facts_by_stage=[5]).sample(0).other is None
    assert make("recall", facts_by_stage=[6]).sample(0).other is not None


@pytest.mark.parametrize("name", ["corpus", *BY_KEY])
def test_samples_are_pure_functions_of_seed_and_index(name: str, make: Any) -> None:
    task = make(name)
    forward = [task.sample(index).tokens for index in range(6)]
    backward = [
        pickle.loads(pickle.dumps(task)).sample(index).tokens for index in reversed(range(6))
    ][::-1]
    assert np.array_equal(forward, backward)
    assert len({tokens.tobytes() for tokens in forward}) == 6
    assert not any(
        np.array_equal(make(name, seed=1).sample(index).tokens, tokens)
        for index, tokens in enumerate(forward)
    )


def planted(sample: TaskSample) -> set[tuple[int, ...]]:
    return {
        tuple(sample.tokens[start:end])
        for start, end in np.concatenate([sample.spans, sample.distractors])
    }


def test_facts_differ_between_seeds_tasks_indices_and_texts(
    make: Any, marks_and_keys: TokenShards
) -> None:
    base = make("recall")
    others = [
        make("recall", seed=1).sample(0),
        make("niah_multiquery").sample(0),
        base.sample(1),
        make("recall", text=marks_and_keys).sample(0),
    ]
    for sample in others:
        assert len(planted(base.sample(0)) & planted(sample)) <= 1, (
            "held-out sequences do not repeat the facts of training"
        )


def test_facts_and_places_use_all_there_is(make: Any, tokenizer: Tokenizer) -> None:
    task, mc = make("recall"), lengths()
    vocabulary = TaskVocabulary.of(tokenizer)
    samples = [task.sample(index) for index in range(150)]
    asked = np.concatenate([sample.spans for sample in samples])
    keys, counts = np.unique(
        [sample.tokens[span[0]] for sample in samples for span in sample.spans], return_counts=True
    )
    assert len(keys) > 120, "450 draws of 128 keys"
    assert counts.max() < 15
    assert set(asked[:, 0] % mc.block_size) == {
        0,
        1,
        2,
    }, "every offset at which 6 tokens fit a block of 8"
    assert len(set(asked[:, 0] // mc.block_size)) == mc.geometry.head_nodes[1], (
        "the asked facts lie in every block, the first and the last too"
    )
    letters = np.concatenate([answers(sample) for sample in samples])
    assert set(letters) == set(vocabulary.letters)


def test_the_stage_sets_the_number_of_facts(make: Any) -> None:
    task = make("recall", facts_by_stage=[6, 12, 24])
    counts = [len(planted(task.sample(3, stage))) for stage in (0, 1, 2, 3, FINAL_STAGE)]
    assert counts == [6, 12, 24, 24, 24]
    assert np.array_equal(task.sample(3).tokens, task.sample(3, 2).tokens)
    assert task.sample(3, 0).tokens.tobytes() != task.sample(3, 1).tokens.tobytes()


@pytest.mark.parametrize("name", [name for name in BY_KEY if name != "niah_single"])
def test_by_default_twice_as_many_facts_as_the_budget_can_open(name: str, make: Any) -> None:
    mc = lengths()
    sample = make(name, facts_by_stage=None).sample(0)
    count = len(sample.spans) + len(sample.distractors)
    assert 2 * open_blocks(mc.geometry, mc.train_wc_length) <= count <= mc.geometry.head_nodes[1]


def test_one_fact_in_each_block_where_twice_as_many_do_not_fit(make: Any) -> None:
    sample = make("recall", lengths(train_wc_length=498), facts_by_stage=None).sample(0)
    assert len(planted(sample)) == lengths().geometry.head_nodes[1]


def test_long_histories_take_more_keys(make: Any, tokenizer: Tokenizer) -> None:
    mc = lengths(seq_len=1536, train_wc_length=738)
    facts = 2 * open_blocks(mc.geometry, mc.train_wc_length)
    assert facts == 140
    task = make("niah_multikey", mc, facts_by_stage=None)
    check_answers(task, task.sample(0), TaskVocabulary.of(tokenizer, facts))
    check_places(task, task.sample(0), mc, facts)


@pytest.mark.parametrize(("max_lod", "blocks"), [(1, 6), (2, 7), (2, 9), (3, 9), (3, 13)])
def test_open_blocks_is_the_most_that_any_cover_has(max_lod: int, blocks: int) -> None:
    block_size = 2 if max_lod == 3 else 3
    geometry = Geometry(
        seq_len=blocks * block_size + 2, block_size=block_size, max_lod=max_lod, recent_tokens=2
    )

    def covers(position: int) -> set[tuple[int, int]]:
        """(entries, blocks at LOD0) of every cover of the head from block `position` on."""
        if position == blocks:
            return {(0, 0)}
        found = {(entries + block_size, opened + 1) for entries, opened in covers(position + 1)}
        for level in range(1, max_lod + 1):
            width = block_size ** (level - 1)
            if position % width == 0 and position + width <= blocks:
                found |= {(entries + 1, opened) for entries, opened in covers(position + width)}
        return found

    best: dict[int, int] = {}
    for entries, opened in covers(0):
        best[entries + 2] = max(best.get(entries + 2, 0), opened)
    assert {length: open_blocks(geometry, length) for length in best} == best


def test_corpus_is_plain_text(make: Any, shards: TokenShards) -> None:
    task = make("corpus")
    assert isinstance(task, CorpusTask)
    sample = task.sample(2)
    text = shards.window(0, len(shards))
    assert (
        (np.lib.stride_tricks.sliding_window_view(text, len(sample.tokens)) == sample.tokens)
        .all(axis=1)
        .any()
    )
    assert (sample.horizon_mask == 1).all()
    assert sample.spans.shape == sample.distractors.shape == (0, 2)
    assert sample.other is None


@pytest.mark.parametrize(
    ("name", "changes", "options", "message"),
    [
        (
            "recal",
            {},
            {},
            r"^task 'recal' is unknown: use corpus, recall, recall_hops2, .*common_words$",
        ),
        (
            "recall",
            {"horizon_tokens": 17},
            {},
            r"^task recall: mc\.horizon_tokens = 17 cannot hold its answers: use at least 18$",
        ),
        (
            "recall",
            {"recent_tokens": 28},
            {},
            (
                r"recent_tokens = 28 cannot hold the question \(5\) and the horizon \(24\): use at"
                r" least 29$"
            ),
        ),
        (
            "recall",
            {"block_size": 5, "train_wc_length": 508},
            {},
            r"a fact of 6 tokens does not fit a block of mc\.block_size = 5",
        ),
        (
            "recall",
            {},
            {"facts_by_stage": [12, 57]},
            r"57 facts do not fit: use 3 to 56 \(at most one in each of the 56 blocks of the head\)$",
        ),
        ("recall", {}, {"facts_by_stage": [2]}, r"2 facts do not fit: use 3 to 56"),
        ("recall", {}, {"facts_by_stage": []}, r"0 facts do not fit"),
        (
            "recall_hops2",
            {},
            {"facts_by_stage": [7]},
            r"7 facts do not fit: use 6 to 56 in steps of 2",
        ),
        ("common_words", {}, {"facts_by_stage": [23]}, r"23 facts do not fit: use 24 to 56"),
        (
            "recall",
            {},
            {"num_keys": 40},
            (
                r"48 facts need 48 keys, but keys of length 1 from 40 pieces allow 40: change num_keys = 40 or"
                r" key_tokens = 1$"
            ),
        ),
        (
            "recall",
            {},
            {"num_keys": 500},
            r"^num_keys = 500: \d+ of the 512 pieces of this vocabulary can serve as keys",
        ),
        ("recall", {}, {"hop": 2}, r"^task recall: unknown key hop: did you mean hops\?$"),
        ("recall", {}, {"hops": 0}, r"^task recall: hops = 0: should be greater than 0$"),
        (
            "recall",
            {"seq_len": 900_000, "train_wc_length": 899_993},
            {},
            r"^the corpus has \d+ tokens, a sample needs 900001",
        ),
        ("corpus", {}, {"questions": 2}, r"^task corpus: questions is not an option"),
        ("corpus", {}, {"facts_by_stage": [6]}, r"^task corpus: facts_by_stage is not an option"),
        (
            "niah_single",
            {},
            {"facts_by_stage": [6]},
            r"this task plants one fact: leave it out, or use niah_multikey$",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    name: str, changes: Any, options: Any, message: str, make: Any
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make(name, lengths(**changes), **options)
    assert "\n" not in str(error.value)


def test_shards_of_another_tokenizer_are_refused(shards: TokenShards, documents: list[str]) -> None:
    with pytest.raises(ConfigError, match="made with another tokenizer"):
        make_task(
            "recall",
            shards=shards,
            tokenizer=train_tokenizer(documents[:2], 400),
            mc=lengths(),
            seed=0,
        )


def test_options_and_properties_tell_the_lengths() -> None:
    assert make_family("recall").horizon_tokens == 18
    assert make_family("recall_key3").horizon_tokens == 24
    assert make_family("recall", questions=2, value_tokens=1).horizon_tokens == 6


@pytest.mark.parametrize("size", [420, 512, 2000])
def test_the_vocabulary_keeps_keys_letters_and_marks_apart(size: int, documents: list[str]) -> None:
    tokenizer = train_tokenizer(documents, size)
    vocabulary = TaskVocabulary.of(tokenizer, 64)
    assert tokenizer.decode(vocabulary.letters) == "abcdefghijklmnopqrstuvwxyz"
    assert tokenizer.decode([vocabulary.question, vocabulary.equals, vocabulary.newline]) == "?=\n"
    assert len(set(vocabulary.keys)) == 64
    texts = [tokenizer.decode([key]) for key in vocabulary.keys]
    assert all(text.strip() and "\n" not in text for text in texts)
    assert not set(texts) & set("abcdefghijklmnopqrstuvwxyz0123456789=?")
    assert vocabulary.keys.min() >= 258, "neither bytes nor the separator"
    assert np.array_equal(TaskVocabulary.of(tokenizer, 32).keys, vocabulary.keys[:32])


def test_a_small_vocabulary_has_128_keys_and_a_tiny_one_says_that_it_has_not(
    documents: list[str],
) -> None:
    assert len(TaskVocabulary.of(train_tokenizer(documents, 512)).keys) == 128
    with pytest.raises(
        ConfigError,
        match=r"num_keys = 128: \d+ of the 380 pieces of this vocabulary can serve as keys",
    ):
        TaskVocabulary.of(train_tokenizer(documents, 380))


def test_rare_pieces_are_preferred_as_keys(documents: list[str]) -> None:
    tokenizer = train_tokenizer(documents, 2000)
    counts = np.bincount(
        np.concatenate([tokenizer.encode_document(text) for text in documents]), minlength=2000
    )
    assert np.median(counts[TaskVocabulary.of(tokenizer).keys]) < np.median(counts[258:])


def test_a_mixture_keeps_its_shares_and_each_part_reads_its_own_sequences_in_order(
    make: Any,
) -> None:
    recall, corpus = make("recall", facts_by_stage=[6, 24]), make("corpus")
    mixed = MixedSource([(3, TaskSource(recall)), (1, TaskSource(corpus))], seed=5)
    parts = np.array([mixed.part(index) for index in range(8000)])
    assert abs((parts == 0).mean() - 0.75) < 0.02
    assert abs((parts[1:] == parts[:-1]).mean() - (0.75**2 + 0.25**2)) < 0.02, (
        "neighbours are independent"
    )
    for index in range(20):
        within = int((parts[:index] == parts[index]).sum())
        for stage in (0, 1):
            expected = (recall, corpus)[parts[index]].sample(within, stage)
            sample = mixed.sample(index, stage)
            assert np.array_equal(sample.tokens, expected.tokens)
            assert np.array_equal(sample.horizon_mask, expected.horizon_mask)
    drawn = np.bincount(parts)
    assert mixed.epochs(8000) == recall.epochs(drawn[0]) | corpus.epochs(drawn[1])
    assert mixed.epochs(8000).keys() == {"recall", "corpus"}
    reseeded = MixedSource([(3, TaskSource(recall)), (1, TaskSource(corpus))], seed=6)
    assert [reseeded.part(index) for index in range(50)] != parts[:50].tolist()


def test_a_mixture_feeds_training(make: Any) -> None:
    source = MixedSource(
        [(0.5, TaskSource(make("recall"))), (0.5, TaskSource(make("corpus")))], seed=0
    )
    dataset = MicroBatchDataset(
        source, lengths(), seed=0, micro_batch_size=8, rank=0, world_size=1, accumulation_steps=1
    )
    batch = dataset[MicroStep(step=0, micro=0, wc_length=302, stage=0)]
    assert batch.tokens.shape == (8, 513)
    assert sorted(set(batch.horizon_mask.sum(1).tolist())) == [12, 24]


@pytest.mark.parametrize("name", ["recall", "recall_hops2", "niah_multivalue"])
def test_repeated_facts_are_the_same_facts_and_those_asked_are_repeated_last(
    make: Any, name: str
) -> None:
    """Counted in the tokens, by a search that knows neither places nor blocks."""
    few = 6 * make_family(name).group_size
    task = make(name, facts_by_stage=[few, 24], planted=36)
    windows = np.lib.stride_tricks.sliding_window_view
    for stage, facts in enumerate((few, 24)):
        sample = task.sample(5, stage)
        head = sample.tokens[: lengths().seq_len - 64]
        copies = [
            int((windows(head, b - a) == sample.tokens[a:b]).all(axis=1).sum())
            for a, b in [*sample.spans, *sample.distractors]
        ]
        assert len(copies) == facts
        assert sum(copies) == 36
        assert set(copies) == ({36 // facts} if stage == 0 else {1, 2})
        assert set(copies[: len(sample.spans)]) == {36 // facts}
    plain = make(name, facts_by_stage=[24]).sample(5)
    assert len(plain.spans) + len(plain.distractors) == 24


def test_a_random_number_of_questions(make: Any) -> None:
    task = make("recall", questions=4, min_questions=1, mc=lengths(recent_tokens=72))
    samples = [task.sample(index) for index in range(60)]
    counts = Counter(len(sample.spans) for sample in samples)
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) >= 6
    for sample in samples:
        assert sample.horizon_mask.sum() == 4 * len(sample.spans)
        assert sample.other is not None
        assert len(sample.other.spans) == len(sample.spans), (
            "the other question is of the same form"
        )
    with pytest.raises(ConfigError, match="min_questions = 5 must be at most questions = 4"):
        make("recall", questions=4, min_questions=5)


def test_another_question_is_left_wherever_the_settings_permit_it(make: Any) -> None:
    """Sequences that have one stay as they are; those that asked for more than half of the
    chains ask for half.
    """
    options = dict(questions=4, min_questions=1, mc=lengths(recent_tokens=72), facts_by_stage=[12])
    before, after = (
        make("recall_hops2", **options),
        make("recall_hops2", leave_another=True, **options),
    )
    capped = 0
    for index in range(40):
        old, new = before.sample(index), after.sample(index)
        assert new.other is not None
        if old.other is None:
            capped += 1
            assert (len(old.spans) // 2, len(new.spans) // 2) == (4, 3)
            assert (
                old.tokens[: lengths().geometry.head_len]
                == new.tokens[: lengths().geometry.head_len]
            ).all(), "the same facts"
        else:
            assert np.array_equal(old.tokens, new.tokens)
    assert 0 < capped < 20
    at_least = make("recall_hops2", leave_another=True, **{**options, "min_questions": 4})
    assert all(
        len(at_least.sample(index).spans) == 8 and at_least.sample(index).other is None
        for index in range(5)
    )


def test_facts_are_planted_for_the_longest_context_that_reads_them(make: Any) -> None:
    mc = lengths()
    for wc_length in (246, 302, 316):
        task = make("niah_multikey", facts_by_stage=None, wc_length=wc_length)
        assert task.facts_by_stage == (2 * open_blocks(mc.geometry, wc_length),)
        assert too_few_facts(task, mc.geometry, wc_length) is None
    crowded = make("niah_multikey", facts_by_stage=None, wc_length=414)
    assert (crowded.facts_by_stage, open_blocks(mc.geometry, 414)) == ((56,), 42)
    line = too_few_facts(crowded, mc.geometry, 414)
    assert line is not None
    assert line.startswith(
        "task niah_multikey: 414 entries can open 42 of the 56 blocks of 512 tokens, which hold 56"
        " facts"
    )
    assert "\n" not in line
    for exempt in (
        make("niah_single", wc_length=414),
        make("corpus", wc_length=414),
        make("recall", facts_by_stage=[24]),
    ):
        assert too_few_facts(exempt, mc.geometry, 414) is None, (
            "one fact, no fact, as many as the run says"
        )


def test_planted_places_that_do_not_fit_are_named(make: Any) -> None:
    for planted in (12, 57):
        with pytest.raises(
            ConfigError, match=rf"planted = {planted} does not fit: use 24 .* to 56"
        ):
            make("recall", facts_by_stage=[6, 24], planted=planted)
    with pytest.raises(ConfigError, match=r"in steps of 2"):
        make("recall_hops2", facts_by_stage=[6, 24], planted=49)
