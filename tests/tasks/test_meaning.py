"""Questions by synonym or gloss: real pairs from WordNet's files, no word in common with the facts,
and retrieval by words at chance.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mc_ds.config import ConfigError, MCConfig, RetrievalConfig, RunConfig
from mc_ds.data import Domain, RunData, ShardWriter, StdlibCorpus, TokenShards, train_tokenizer
from mc_ds.evaluation.batches import BatchView
from mc_ds.focus.policies import POLICIES
from mc_ds.tasks import PlantedTask, TaskSample, TaskVocabulary, make_family, make_task
from mc_ds.tasks.meaning import is_held_out
from mc_ds.tasks.mixture import check_tasks, evaluated_task, make_source, run_task
from mc_ds.tasks.wordnet import Meaning, read_meanings
from tests.support.optional import needs
from tests.support.wordnet import NOUNS, SYNSETS, WORDS, write_wordnet

FACTS, QUESTIONS = 24, 2
BY = ["synonym", "gloss"]


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wordnet(tmp_path_factory.mktemp("dict") / "wordnet")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    """Text of the standard library; the words of the database are pieces of the tokenizer."""
    documents = list(StdlibCorpus(val_fraction=0.05).documents("val"))[:20]
    tokenizer = train_tokenizer([*documents, *[f" {WORDS}"] * 300], vocab_size=1600)
    folder = tmp_path_factory.mktemp("text") / "shards"
    with ShardWriter(
        folder, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    ) as writer:
        for document in documents:
            writer.append(tokenizer.encode_document(document))
    domains = (Domain("corpus", 1.0, TokenShards(folder)),)
    return RunData(
        title="",
        identity="",
        fingerprint="",
        tokenizer=tokenizer,
        cache=folder,
        train=domains,
        val=domains,
    )


def lengths(**changes: Any) -> MCConfig:
    """T = 512, K = 16: 26 head blocks."""
    base = dict(
        seq_len=512,
        block_size=16,
        max_lod=1,
        train_wc_length=242,
        recent_tokens=96,
        horizon_tokens=48,
    )
    return MCConfig(**{**base, **changes})


def made(name: str, corpus: RunData, wordnet: Path | None, **changes: Any) -> PlantedTask:
    options: dict[str, Any] = dict(
        facts_by_stage=[FACTS],
        questions=QUESTIONS,
        wordnet=None if wordnet is None else str(wordnet),
        held_out=False,
    )
    task = make_task(
        name,
        shards=corpus.val[0].shards,
        tokenizer=corpus.tokenizer,
        mc=lengths(),
        seed=3,
        **options | changes,
    )
    assert isinstance(task, PlantedTask)
    return task


def visible(sample: TaskSample) -> Any:
    return sample.tokens[: len(sample.tokens) - len(sample.horizon_mask)]


def question_of(sample: TaskSample, corpus: RunData) -> list[str]:
    """The expressions asked for, as text."""
    marks = TaskVocabulary.of(corpus.tokenizer)
    tokens = visible(sample)
    assert tokens[-1] == marks.newline
    first = np.flatnonzero(tokens == marks.question)[-QUESTIONS]
    asked = corpus.tokenizer.decode(tokens[first:-1])
    return [expression.strip() for expression in asked.split("?")[1:]]


def facts_of(sample: TaskSample, corpus: RunData) -> dict[str, str]:
    """Word and value of every fact, read from the text."""
    spans = np.concatenate([sample.spans, sample.distractors])
    texts = [corpus.tokenizer.decode(sample.tokens[a:b]) for a, b in spans]
    facts = dict(text.split("=") for text in texts)
    assert len(facts) == len(texts), "every word has one value"
    return {word.strip(): value for word, value in facts.items()}


def partners(word: str, by: str) -> set[str]:
    synset = next(
        synset for synsets in SYNSETS.values() for synset in synsets if word in synset.words.split()
    )
    if by == "synonym":
        return set(synset.words.split()) - {word}
    return {synset.gloss.split(";")[0].split(" (")[0]}


def test_meanings_are_first_senses_of_single_tagged_words(wordnet: Path) -> None:
    found = dict(read_meanings(wordnet))
    assert found["boat", "ship"] == "a thing that carries people over water"
    assert found["road", "street"] == "a way for cars"
    assert found["cave", "grotto"] == "a hollow under a hill"
    assert ("house", "home") in found, "without domicile, of which no sense was tagged"
    assert ("novel", "book") in found, "without volume, whose first sense is another"
    assert ("volume", "loudness") in found
    words = [word for words in found for word in words]
    assert len(words) == len(set(words))
    assert not {"domicile", "bungalow", "old_norse"} & {word.lower() for word in words}


def test_a_word_of_two_parts_of_speech_belongs_to_neither(tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path / "wordnet")
    entry = "boat v 1 0 1 1 00000123  \n"
    (folder / "index.verb").write_text((folder / "index.verb").read_text() + entry)
    found = [words for words, _ in read_meanings(folder)]
    assert ("ship",) in found
    assert not any("boat" in words for words in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.verb", None, r"data\.verb cannot be read \(No such file.*wordnet-base$"),
        ("index.adj", "big a", r"index\.adj is not a database file of WordNet: line 1 has"),
        ("data.noun", "00000001 03 n zz boat", r"data\.noun is not a .*: line 1 has another"),
        ("data.adv", b"\xff\xfe", r"data\.adv is not a database file of WordNet: it is not text"),
    ],
)
def test_damaged_databases_are_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = write_wordnet(tmp_path / "wordnet") / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as error:
        read_meanings(path.parent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("by", BY)
def test_the_facts_answer_questions_of_the_same_meaning(
    by: str, corpus: RunData, wordnet: Path
) -> None:
    task = made(by, corpus, wordnet)
    for index in range(20):
        sample = task.sample(index)
        assert sample.other is not None
        for asking in (sample, sample.other):
            facts, asked = facts_of(asking, corpus), question_of(asking, corpus)
            assert (len(facts), len(asked), len(asking.spans)) == (FACTS, QUESTIONS, QUESTIONS)
            words = list(facts)[:QUESTIONS]
            assert all(q in partners(word, by) for q, word in zip(asked, words, strict=True))
            horizon = asking.tokens[-len(asking.horizon_mask) :]
            answer = corpus.tokenizer.decode(horizon[asking.horizon_mask == 1])
            assert answer == "".join(facts[word] for word in words)
            blocks = np.concatenate([asking.spans, asking.distractors]) // 16
            assert len(set(blocks[:, 0])) == FACTS
        assert visible(sample)[:400].tolist() == visible(sample.other)[:400].tolist()
        assert not set(question_of(sample, corpus)) & set(question_of(sample.other, corpus))


@pytest.mark.parametrize("by", BY)
def test_no_token_of_a_question_is_in_a_fact(by: str, corpus: RunData, wordnet: Path) -> None:
    task, marks = made(by, corpus, wordnet), TaskVocabulary.of(corpus.tokenizer)
    template = {marks.question, marks.newline, marks.equals, *marks.letters.tolist()}
    for index in range(50):
        sample = task.sample(index)
        assert sample.other is not None
        spans = np.concatenate([sample.spans, sample.distractors])
        planted = {int(t) for a, b in spans for t in sample.tokens[a:b]} - template
        for asking in (sample, sample.other):
            tokens = visible(asking)
            start = np.flatnonzero(tokens == marks.question)[-QUESTIONS]
            assert len(planted) >= FACTS
            assert not planted & (set(tokens[start:].tolist()) - template)


def opened_by_bm25(samples: list[TaskSample], wc_length: int) -> list[tuple[Any, Any]]:
    """Whether the policy opens each asked fact and each other fact of the samples."""
    mc = lengths()
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    seeds = [(0, row) for row in range(len(samples))]
    absent: Any = None
    view = BatchView(
        mc=mc,
        controller=absent,
        focus_config=absent,
        forward=absent,
        tokens=tokens,
        nodes=absent,
        lens_tokens=tokens,
        spans=[],
        seeds=seeds,
        device=tokens.device,
    )
    settings = RetrievalConfig(query_tokens=32, share=1.0)
    plan = POLICIES["bm25"].using(settings).choose(view, wc_length)
    read = torch.zeros(len(samples), mc.seq_len, dtype=torch.bool)
    read.scatter_(1, plan.starts, plan.lods == 0)
    return [
        tuple(
            np.array([bool(read[row, a:b].all()) for a, b in spans])
            for spans in (sample.spans, sample.distractors)
        )
        for row, sample in enumerate(samples)
    ]


@needs("bm25s")
@pytest.mark.parametrize("by", BY)
def test_bm25_opens_asked_facts_at_chance(by: str, corpus: RunData, wordnet: Path) -> None:
    """If the question says nothing to BM25, the asked facts of a sequence are a random choice of
    its facts. The number of opened ones then varies less than a binomial one, of which five standard
    deviations are allowed.
    """
    task = made(by, corpus, wordnet)
    found = opened_by_bm25([task.sample(index) for index in range(300)], wc_length=242)
    shares = np.array([np.concatenate(pair).mean() for pair in found])
    opened = sum(int(asked.sum()) for asked, _ in found)
    expected = QUESTIONS * shares.sum()
    deviation = np.sqrt(QUESTIONS * (shares * (1 - shares)).sum())
    assert 0.2 < shares.mean() < 0.6
    assert abs(opened - expected) < 5 * deviation


def opened_of_task(name: str, corpus: RunData, count: int) -> list[tuple[Any, Any]]:
    """`opened_by_bm25` of the first samples of a task that needs no WordNet."""
    task = make_task(
        name,
        shards=corpus.val[0].shards,
        tokenizer=corpus.tokenizer,
        mc=lengths(),
        seed=3,
        facts_by_stage=[FACTS],
        questions=QUESTIONS,
    )
    return opened_by_bm25([task.sample(index) for index in range(count)], wc_length=242)


@needs("bm25s")
def test_bm25_opens_facts_asked_by_their_words(corpus: RunData) -> None:
    """The measurement above would notice a word in common."""
    found = opened_of_task("recall", corpus, 100)
    shares = np.array([np.concatenate(pair).mean() for pair in found])
    opened = sum(int(asked.sum()) for asked, _ in found)
    deviation = np.sqrt(QUESTIONS * (shares * (1 - shares)).sum())
    assert opened - QUESTIONS * shares.sum() > 5 * deviation


@needs("bm25s")
def test_bm25_opens_the_item_that_is_named_and_not_its_neighbour(corpus: RunData) -> None:
    found = opened_of_task("neighbour", corpus, 200)
    named, neighbours = np.concatenate([asked.reshape(-1, 2) for asked, _ in found]).T
    others = np.concatenate([others for _, others in found])
    deviation = 0.5 * np.sqrt(2 / len(named))
    assert named.mean() - neighbours.mean() > 5 * deviation
    assert abs(neighbours.mean() - others.mean()) < 0.5 * (named.mean() - others.mean())


def test_training_and_held_out_words_are_disjoint(corpus: RunData, wordnet: Path) -> None:
    used: dict[bool, set[str]] = {}
    for held_out in (False, True):
        words = used.setdefault(held_out, set())
        for by in BY:
            options: dict[str, Any] = dict(wordnet=str(wordnet), held_out=held_out)
            for pairs in make_family(by, **options).paraphrases(corpus.tokenizer):
                for planted, asked in pairs:
                    words.add(corpus.tokenizer.decode(planted).strip())
                    words |= {corpus.tokenizer.decode(asked).strip()} if by == "synonym" else set()
    assert len(used[False]) > len(used[True]) > 10
    assert not used[False] & used[True]


def test_the_part_of_a_meaning_depends_on_its_words_alone() -> None:
    meanings = [Meaning(tuple(synset.words.split()), "") for synset in NOUNS]
    parts = [is_held_out(meaning) for meaning in meanings]
    assert 0 < sum(parts) < len(parts)
    assert parts == [is_held_out(Meaning(words[::-1], "other")) for words, _ in meanings]


def test_runs_train_on_some_words_and_are_measured_on_others(
    corpus: RunData, wordnet: Path
) -> None:
    config = RunConfig.model_validate(
        dict(
            mc=lengths().model_dump(),
            data=dict(
                tasks={"gloss": 1.0},
                wordnet=str(wordnet),
                recall=dict(facts_by_stage=[4, 8], planted=12, questions=2, min_questions=1),
            ),
        )
    )
    source = make_source(config, corpus, corpus.train)
    validated = run_task("gloss", config, corpus, corpus.val, seed=0)
    evaluated = evaluated_task(
        "gloss", config, corpus, corpus.val, seed=0, wc_length=242, as_trained=True
    )
    assert isinstance(evaluated, PlantedTask)
    assert (evaluated.facts_by_stage, evaluated.planted) == ((8,), 12)
    held_out = {
        word for meaning in read_meanings(wordnet) if is_held_out(meaning) for word in meaning.words
    }
    for task in (validated, evaluated):
        for index in range(5):
            assert facts_of(task.sample(index), corpus).keys() <= held_out
    marks = TaskVocabulary.of(corpus.tokenizer)
    for index in range(5):
        tokens, mask = source.sample(index, 1)
        answer = tokens[-len(mask) :]
        word = corpus.tokenizer.decode(answer[: np.flatnonzero(answer == marks.equals)[0]])
        assert word.strip() not in held_out


@pytest.mark.parametrize("by", BY)
def test_samples_are_pure_functions_of_seed_and_index(
    by: str, corpus: RunData, wordnet: Path
) -> None:
    task = made(by, corpus, wordnet, questions=2, min_questions=1)
    samples = [task.sample(index) for index in range(6)]
    again = [pickle.loads(pickle.dumps(task)).sample(index) for index in reversed(range(6))][::-1]
    for one, other in zip(samples, again, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.spans, other.spans)
    assert {len(sample.spans) for sample in samples} == {1, 2}
    assert len({sample.tokens.tobytes() for sample in samples}) == 6


ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("synonym", {"wordnet": None}, r"^task synonym: questions by synonym need WordNet: give"),
    (
        "synonym",
        {"held_out": True},
        (
            rf"^task synonym: {FACTS} facts asked by synonym need as many words without a token of"
            r" the questions, but only \d+ of \d+ meanings are left"
        ),
    ),
    (
        "gloss",
        {"wordnet": "/usr/share"},
        r"^task gloss: wordnet: /usr/share has no index\.noun: give a folder with WordNet's",
    ),
    ("gloss", {"word_tokens": 12}, r"a fact of 17 tokens does not fit a block"),
    (
        "gloss",
        {"questions": 7},
        r"horizon_tokens = 48 cannot hold its answers: use at least 56",
    ),
]


def test_a_run_learns_of_missing_files_before_it_makes_any_token() -> None:
    data = dict(tasks={"synonym": 1.0}, recall=dict(facts_by_stage=[FACTS]))
    config = RunConfig.model_validate(dict(mc=lengths().model_dump(), data=data))
    with pytest.raises(ConfigError, match=r"^task synonym: questions by synonym need WordNet"):
        check_tasks(config)


@pytest.mark.parametrize(("name", "options", "message"), ERRORS)
def test_what_does_not_fit_is_refused_in_one_line(
    name: str, options: dict[str, Any], message: str, corpus: RunData, wordnet: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        made(name, corpus, **{"wordnet": wordnet, **options})
    assert "\n" not in str(error.value)
