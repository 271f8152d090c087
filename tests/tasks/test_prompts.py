"""Prompts can be answered from their text alone: readers that know only the sentences answer them.
Lengths are exact, and scores are those of the tasks' authors.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_ds.config import ConfigError
from mc_ds.data import Domain, ShardWriter, StdlibCorpus, Tokenizer, TokenShards, train_tokenizer
from mc_ds.tasks.prompts import (
    PROMPT_GROUPS,
    PROMPTS,
    Page,
    Prompt,
    PromptTask,
    TextSource,
    score,
)
from mc_ds.tasks.prompts.lists import CommonWords, FrequentWords, VariableTracking, zeta
from mc_ds.tasks.prompts.needles import Needles
from mc_ds.tasks.prompts.stories import PLACES, Stories

LENGTHS = (3072, 4001)
NEEDLES = [name for name, family in PROMPTS.items() if isinstance(family, Needles)]
STORIES = PROMPT_GROUPS["stories"]


def domain(folder: Path, tokenizer: Tokenizer, documents: list[str]) -> Domain:
    with ShardWriter(
        folder, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    ) as writer:
        for document in documents:
            writer.append(tokenizer.encode_document(document))
    return Domain("corpus", 1.0, TokenShards(folder))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(StdlibCorpus(val_fraction=0.05).documents("val"))[:30]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> TextSource:
    tokenizer = train_tokenizer(documents, vocab_size=1200)
    folder = tmp_path_factory.mktemp("text")
    return TextSource(tokenizer, [domain(folder / "shards", tokenizer, documents)])


def made(name: str, source: TextSource, seed: int = 0) -> PromptTask:
    return PromptTask(name, PROMPTS[name], source, seed=seed)


def text_of(prompt: Prompt, source: TextSource) -> str:
    return source.tokenizer.decode(prompt.tokens)


def lines_at(prompt: Prompt, spans: Any, source: TextSource) -> list[str]:
    return [source.tokenizer.decode(prompt.tokens[a:b]).strip() for a, b in spans]


# Readers


def read_needles(text: str) -> list[str]:
    """The secrets of all names in the question."""
    body, _, question = text.rpartition("\nQuestion:")
    found = re.findall(r"The secret (?:number|code) of (\S+) is (\S+)\.\n", body)
    listed = re.search(r"secret \w+ of (.*) in the text above", question)
    assert listed is not None
    names = re.split(r", | and ", listed[1])
    return [secret for name in names for key, secret in found if key == name]


def read_variables(text: str) -> list[str]:
    """All variables of the text with the value in the question, in the order of the text."""
    body = text.partition("\nText:\n")[2]
    asked = re.search(r"have the value (\d+), directly", body)
    assert asked is not None
    values: dict[str, str] = {}
    for name, given in re.findall(r"Let (\w+) = (\w+)\.", body):
        assert name not in values
        values[name] = values.get(given, given)
    return [name for name, value in values.items() if value == asked[1]]


def read_counts(text: str, pattern: str) -> list[tuple[str, int]]:
    body = text.partition("\nText:\n")[2].rpartition("\nQuestion:")[0]
    return Counter(re.findall(pattern, body)).most_common()


def read_story(sentences: list[str], question: str) -> str:
    """The answer to a question, by what the sentences say of who is and was where."""
    if asked := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        relation = [asked[1], asked[2]]
        return {**relations(sentences)}[relation[0], relation[1]]
    if asked := re.fullmatch(r"What is the (\w+) (\w+) of\?", question):
        return next(b for (way, b), a in relations(sentences).items() if (a, way) == asked.groups())
    at: dict[str, str] = {}
    holder: dict[str, str] = {}
    trail: dict[str, list[str]] = {}
    gifts = []
    for sentence in sentences:
        if event := re.fullmatch(r"(\w+) went to the (\w+)\.", sentence):
            at[event[1]] = event[2]
        elif event := re.fullmatch(r"(\w+) picked up the (\w+)\.", sentence):
            holder[event[2]] = event[1]
        elif event := re.fullmatch(r"(\w+) put down the (\w+)\.", sentence):
            holder.pop(event[2], None)
        elif event := re.fullmatch(r"(\w+) handed the (\w+) to (\w+)\.", sentence):
            holder[event[2]] = event[3]
            gifts.append(event.groups())
        else:
            raise AssertionError(sentence)
        for thing, person in holder.items():
            place = at.get(person, "")
            if place and trail.setdefault(thing, [""])[-1] != place:
                trail[thing].append(place)
    if asked := re.fullmatch(r"Where is (\w+)\?", question):
        return at[asked[1]]
    if asked := re.fullmatch(r"Where is the (\w+)\?", question):
        return trail[asked[1]][-1]
    if asked := re.fullmatch(r"Where was the (\w+) before it was in the (\w+)\?", question):
        places = trail[asked[1]]
        return places[places.index(asked[2]) - 1]
    for form, answer in (
        (r"Who handed the (?P<b>\w+) to (?P<c>\w+)\?", 0),
        (r"What did (?P<a>\w+) hand to (?P<c>\w+)\?", 1),
        (r"To whom did (?P<a>\w+) hand the (?P<b>\w+)\?", 2),
    ):
        if asked := re.fullmatch(form, question):
            given = asked.groupdict()
            alike = [
                gift
                for gift in gifts
                if all(gift["abc".index(part)] == name for part, name in given.items())
            ]
            (one,) = alike
            return str(one[answer])
    raise AssertionError(question)


def relations(sentences: list[str]) -> dict[tuple[str, str], str]:
    """What lies in a direction of a place."""
    back = {"north": "south", "south": "north", "east": "west", "west": "east"}
    found = {}
    for sentence in sentences:
        said = re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", sentence)
        assert said is not None
        found[said[2], said[3]] = said[1]
        found[back[said[2]], said[1]] = said[3]
    return found


def question_of(text: str) -> str:
    return text.rpartition("Question: ")[2].partition("\n")[0]


# All prompts


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_has_exactly_the_length_and_ends_with_its_question(
    name: str, length: int, source: TextSource
) -> None:
    task = made(name, source)
    for index in range(4):
        prompt = task.prompt(index, length)
        text = text_of(prompt, source)
        assert prompt.tokens.shape == (length,)
        assert prompt.tokens.dtype == np.int64
        assert prompt.tokens[0] == source.tokenizer.separator_id
        assert (prompt.tokens[1:] != source.tokenizer.separator_id).all()
        assert re.search(r"\nQuestion: [^\n]+\nAnswer:[^\n]*$", text)
        assert all(answer in text for answer in prompt.answers)
        assert len(set(prompt.answers)) == len(prompt.answers)
        places = np.concatenate([prompt.spans, prompt.distractors])
        places = places[np.argsort(places[:, 0])]
        assert (places[:, 0] < places[:, 1]).all()
        assert (places[1:, 0] >= places[:-1, 1]).all(), "facts do not overlap"
        assert (np.diff(prompt.spans[:, 0]) > 0).all()
        written = source.tokenizer.encode(" " + ", ".join(prompt.answers))
        assert prompt.max_new_tokens >= max(task.family.new_tokens, len(written))


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_functions_of_seed_index_length_and_text(
    name: str, source: TextSource, tmp_path: Path, documents: list[str]
) -> None:
    task = made(name, source)
    forward = [task.prompt(index, 3072) for index in range(3)]
    backward = [made(name, source).prompt(index, 3072) for index in (2, 1, 0)][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert list(one.answers) == list(other.answers)
    elsewhere = TextSource(
        source.tokenizer, [domain(tmp_path / "shards", source.tokenizer, documents[:20])]
    )
    others = [
        *forward,
        made(name, source, seed=1).prompt(0, 3072),
        task.prompt(0, 3073),
        made(name, elsewhere).prompt(0, 3072),
    ]
    assert len({prompt.tokens.tobytes() for prompt in others}) == len(others)


def test_the_groups_hold_all_tasks() -> None:
    assert [len(names) for names in PROMPT_GROUPS.values()] == [11, 5]
    assert [name for names in PROMPT_GROUPS.values() for name in names] == list(PROMPTS)


# RULER


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_are_there_once_and_answer_the_question(name: str, source: TextSource) -> None:
    task = made(name, source)
    family: Any = task.family
    for index in range(8):
        prompt = task.prompt(index, 3072)
        text = text_of(prompt, source)
        assert sorted(read_needles(text)) == sorted(prompt.answers)
        assert len(prompt.answers) == len(prompt.spans) == family.asked * family.values
        assert len(prompt.distractors) == (family.keys - family.asked) * family.values
        said = lines_at(prompt, prompt.spans, source)
        assert sorted(line.split()[-1][:-1] for line in said) == sorted(prompt.answers)
        secret = r"\d{7}" if family.secrets == "numbers" else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-\w{12}"
        assert all(re.fullmatch(secret, answer) for answer in prompt.answers)
        named = re.findall(r"The secret \w+ of (\S+) is", text.rpartition("\nQuestion:")[0])
        count = family.keys * family.values
        if family.haystack == "needles":
            share = sum(len(line) for line in re.findall(r"The secret [^\n]*\n", text)) / len(text)
            assert share > 0.7, "the haystack consists of needles"
            assert len(set(named)) == len(named)
        else:
            assert len(named) == count
            assert len(set(named)) == family.keys


def test_haystacks_are_noise_or_text_of_the_corpus(
    source: TextSource, documents: list[str]
) -> None:
    noise = text_of(made("ruler_single_1", source).prompt(0, 3072), source)
    assert noise.count("Nobody was in a hurry that day.\n") > 30
    prompt = made("ruler_single_2", source).prompt(0, 3072)
    text = text_of(prompt, source)
    before = text[: text.index("\nThe secret number of")].splitlines()[2:-1]
    held = "\n".join(documents).splitlines()
    assert sum(line in held for line in before[1:]) >= 0.95 * len(before[1:])


def test_needles_stand_everywhere(source: TextSource) -> None:
    task = made("ruler_single_2", source)
    depths = [task.prompt(index, 3072).spans[0, 0] / 3072 for index in range(60)]
    assert np.histogram(depths, bins=4, range=(0, 1))[0].min() >= 4


def test_variables_of_a_chain_are_found_by_following_it(source: TextSource) -> None:
    for chains in (1, 3):
        task = PromptTask("vt", VariableTracking(chains=chains), source, seed=0)
        for index in range(8):
            prompt = task.prompt(index, 3072)
            assert read_variables(text_of(prompt, source)) == prompt.answers
            assert len(prompt.answers) == len(prompt.spans) == 5
            assert len(prompt.distractors) == 5 * (chains - 1)
            question = text_of(prompt, source).rpartition("\nQuestion:")[2]
            alone = ["\nText:", *lines_at(prompt, prompt.spans, source), question]
            assert read_variables("\n".join(alone)) == prompt.answers, "the facts needed suffice"


@pytest.mark.parametrize("length", [*LENGTHS, 40_000])
def test_common_words_are_ten_times_as_frequent(length: int, source: TextSource) -> None:
    prompt = made("ruler_cwe", source).prompt(0, length)
    text = text_of(prompt, source)
    counts = read_counts(text, r" \d+\. (\w+)")
    assert {word for word, _ in counts[:10]} == set(prompt.answers)
    assert len({count for _, count in counts[:10]}) == 1
    assert {count for _, count in counts[10:]} == {counts[0][1] // 10}
    numbers = re.findall(r" (\d+)\. \w+", text.partition("\nText:\n")[2].rpartition("\nQ")[0])
    assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1))
    assert len(prompt.spans) == len(prompt.distractors) == 0
    example = text.partition("\nText:\n")[0]
    assert not set(prompt.answers) & set(re.findall(r"[a-z]+", example.partition("Example:")[2]))
    blanks = len(text) - len(text.replace("\n", ""))
    assert blanks < 60, "hardly anything is filled up"


def test_no_common_word_is_said_around_the_list(tmp_path: Path, source: TextSource) -> None:
    """Also where the corpus has the words of the instruction and the question."""
    said = ["each", "text", "list", "numbered", "words", "find", "most", "common", "example"]
    said += ["question", "what", "this", "answer"]
    words = " ".join([*said, *(f"{a}{b}ing" for a in "bcdfgh" for b in ("al", "er", "ou", "ick"))])
    few = TextSource(
        source.tokenizer, [domain(tmp_path / "shards", source.tokenizer, [f"{words} end"] * 300)]
    )
    task = PromptTask("cwe", CommonWords(asked=4), few, seed=0)
    for index in range(10):
        prompt = task.prompt(index, 3072)
        text = text_of(prompt, few)
        around = text.partition("\nText:\n")[0] + text.rpartition("\nQuestion:")[2]
        assert len(prompt.answers) == 4
        assert not set(prompt.answers) & set(re.findall(r"[a-z]+", around.lower()))


def test_common_words_repeat_more_where_the_corpus_has_few_words(
    tmp_path: Path, source: TextSource
) -> None:
    words = " ".join(source.words[:60])
    few = TextSource(
        source.tokenizer, [domain(tmp_path / "shards", source.tokenizer, [words] * 300)]
    )
    prompt = made("ruler_cwe", few).prompt(0, 20_000)
    counts = read_counts(text_of(prompt, few), r" \d+\. (\w+)")
    assert counts[0][1] == 10 * counts[-1][1] > 30
    assert {word for word, _ in counts[:10]} == set(prompt.answers)


@pytest.mark.parametrize("length", [*LENGTHS, 40_000])
def test_frequent_words_follow_a_zeta_distribution(length: int, source: TextSource) -> None:
    prompt = made("ruler_fwe", source).prompt(0, length)
    counts = read_counts(text_of(prompt, source), r"(?:\.\.\.|[a-z]{6})(?=\s)")
    assert counts[0][0] == "..."
    assert [word for word, _ in counts[1:4]] == prompt.answers
    assert counts[3][1] > counts[4][1]
    total = sum(count for _, count in counts)
    for rank, (_, count) in enumerate(counts[:6], start=1):
        assert count / total == pytest.approx(rank**-2 / (np.pi**2 / 6), rel=0.15)


def test_zeta_is_the_sum_of_powers() -> None:
    assert zeta(2.0) == pytest.approx(np.pi**2 / 6, abs=1e-9)
    assert zeta(4.0) == pytest.approx(np.pi**4 / 90, abs=1e-9)
    assert zeta(1.5) == pytest.approx(2.6123753487, abs=1e-8)


# Stories


@pytest.mark.parametrize("name", STORIES)
def test_the_sentences_of_a_story_answer_its_question(name: str, source: TextSource) -> None:
    task = made(name, source)
    kinds = Counter()
    for index in range(60):
        prompt = task.prompt(index, 3072)
        text = text_of(prompt, source)
        question, (answer,) = question_of(text), prompt.answers
        kinds[question.split()[0]] += 1
        places = np.concatenate([prompt.spans, prompt.distractors])
        sentences = lines_at(prompt, places[np.argsort(places[:, 0])], source)
        assert read_story(sentences, question) == answer
        assert read_story(lines_at(prompt, prompt.spans, source), question) == answer, (
            "the facts needed suffice"
        )
        assert answer not in prompt.wrong
        assert not set(prompt.wrong) & set(re.findall(r"\w+", question))
        example = text.partition("\nText:\n")[0].partition("Example:\n")[2]
        shown, asked, solved = example.strip().split("\n")
        told = [f"{sentence}." for sentence in shown.rstrip(".").split(". ")]
        solution = read_story(told, asked.removeprefix("Question: "))
        assert solved == f"Answer: {solution}."
    if name == "stories_5":
        assert set(kinds) == {"Who", "What", "To"}


def test_the_number_of_facts_grows_with_the_kind(source: TextSource) -> None:
    counts = {
        kind: {len(made(f"stories_{kind}", source).prompt(i, 3072).spans) for i in range(40)}
        for kind in (1, 2, 3, 4, 5)
    }
    assert counts[1] == counts[4] == counts[5] == {1}
    assert counts[2] <= {2, 3}
    assert min(counts[3]) >= 3


# Scores


def scored(answers: list[str], text: str, **options: Any) -> float:
    return score(Prompt(np.zeros(1, dtype=np.int64), answers, **options), text)


def test_a_score_is_the_share_of_answers_in_the_continuation() -> None:
    numbers = ["1234567", "7654321"]
    assert scored(numbers, " 7654321 and 1234567.\nQuestion: next") == 1.0
    assert scored(numbers, " 1234567, 1234568") == 0.5
    assert scored(numbers, "") == 0.0
    assert scored(["QWERT"], " qwert") == 1.0, "case does not matter"
    assert scored(["port"], "a report") == 1.0, "as a substring"


def test_another_candidate_in_the_first_sentence_scores_nothing() -> None:
    options: dict[str, Any] = dict(wrong=["cellar", "stable"], stop=(".", "\n"))
    assert scored(["attic"], " attic.", **options) == 1.0
    assert scored(["attic"], " the Attic. The cellar", **options) == 1.0
    assert scored(["attic"], " attic\ncellar", **options) == 1.0
    assert scored(["attic"], " attic or cellar.", **options) == 0.0
    assert scored(["attic"], " cellars? attic", **options) == 1.0, "another word"
    assert scored(["attic"], " kitchen. attic", **options) == 0.0


# Mistakes


@pytest.mark.parametrize("name", PROMPTS)
def test_too_short_a_prompt_is_refused_in_one_line(name: str, source: TextSource) -> None:
    message = rf"^task {name}: 64 tokens are too few: .*: use (at least \d+|a longer history)$"
    with pytest.raises(ConfigError, match=message) as error:
        made(name, source).prompt(0, 64)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_says_so(source: TextSource, tmp_path: Path) -> None:
    for family, length, message in (
        (FrequentWords(letters=40), 500, "the 3 most frequent words do not stand out"),
        (CommonWords(), 800, r"they hold \d words besides the common ones"),
    ):
        with pytest.raises(ConfigError, match=rf"{length} tokens are too few: {message}"):
            PromptTask("list", family, source, seed=0).prompt(0, length)
    with pytest.raises(ValueError, match="asked = 2 must be at most keys = 1"):
        Needles(asked=2)
    with pytest.raises(ValueError, match="kind"):
        Stories.model_validate({"kind": 6})
    numbers = TextSource(
        source.tokenizer, [domain(tmp_path / "shards", source.tokenizer, ["1 2 3 " * 500])]
    )
    with pytest.raises(ConfigError, match="the corpus has only 0 different words"):
        made("ruler_single_2", numbers).prompt(0, 1024)


def test_a_text_without_line_breaks_has_places_for_facts(
    source: TextSource, tmp_path: Path
) -> None:
    flat = " ".join(source.words) + " " + "word " * 4000
    text = TextSource(source.tokenizer, [domain(tmp_path / "shards", source.tokenizer, [flat])])
    task = made("ruler_single_2", text)
    depths = {int(task.prompt(index, 3072).spans[0, 0]) for index in range(30)}
    assert len(depths) > 5
    page = Page(text, 3072, np.random.default_rng(0))
    assert sum(map(len, page.text(1000))) == 1000
    assert len(PLACES) == 6


def test_short_texts_are_repeated(source: TextSource, tmp_path: Path) -> None:
    short = TextSource(
        source.tokenizer, [domain(tmp_path / "shards", source.tokenizer, [" ".join(source.words)])]
    )
    prompt = made("stories_1", short).prompt(0, 20_000)
    assert len(prompt.tokens) == 20_000
