"""The tokenizer gives back exactly what it was given, and the same text always gives the same
model.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_ds.config import ConfigError
from mc_ds.data.tokenizer import Tokenizer, base, load_tokenizer, train_tokenizer
from mc_ds.data.tokenizer import sentencepiece_bpe as tokenizer_module

DOCUMENTS = [inspect.getsource(inspect), inspect.getsource(pytest.raises)]
TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\n\u2581"), max_size=60
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, vocab_size=600)


def test_source_code_round_trips_and_shrinks(tokenizer: Tokenizer) -> None:
    for text in DOCUMENTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text) / 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   lead",
        "trail   ",
        "a\n\n\n\tb\r\n        c",
        "<doc><s> <0x41> ⁇",
        "\u2581",
        " a\u2581 \u2581\u2581b",
        "\0\x01\ufeff\u2028",
        "日本語😀e\u0301é",
    ],
)
def test_exact_round_trip_of_awkward_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(1 < i < tokenizer.vocab_size for i in ids), (
        "neither the unknown id nor a separator comes from text"
    )


@given(text=TEXT)
def test_exact_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_document_starts_with_the_separator_which_decodes_to_nothing(
    tokenizer: Tokenizer,
) -> None:
    ids = tokenizer.encode_document("x = 1\n")
    assert ids[0] == tokenizer.separator_id
    assert (ids[1:] != tokenizer.separator_id).all()
    assert tokenizer.end_ids == {tokenizer.separator_id}
    assert tokenizer.decode(ids) == "x = 1\n"


@settings(deadline=None)  # threads are started for every list
@given(texts=st.lists(TEXT, max_size=6))
def test_several_texts_are_encoded_as_each_alone(tokenizer: Tokenizer, texts: list[str]) -> None:
    several = tokenizer.encode_many(texts)
    assert several == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in several] == texts


@pytest.mark.parametrize(
    "texts", [[], [""], ["", "\u2581", ""], ["a\u2581", "\u2581\u2581b", "", "c"]]
)
def test_empty_texts_and_space_symbols_stay_with_their_text(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_many(texts)] == texts


@settings(deadline=None)
@given(texts=st.lists(TEXT, max_size=6), characters=st.integers(1, 99))
def test_a_document_is_the_same_in_any_batch(
    tokenizer: Tokenizer, texts: list[str], characters: int
) -> None:
    alone = [tokenizer.encode_document(text) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "BATCH_CHARACTERS", characters)
        batched = list(tokenizer.encode_documents(iter(texts)))
    assert [(ids.dtype, ids.tolist()) for ids in batched] == [
        (ids.dtype, ids.tolist()) for ids in alone
    ]
    assert [ids[0] for ids in batched] == [tokenizer.separator_id] * len(texts)
    assert [tokenizer.decode(ids) for ids in batched] == texts


def test_endless_documents_are_drawn_a_batch_at_a_time(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BATCH_CHARACTERS", 10)
    drawn = 0

    def endless() -> Iterator[str]:
        nonlocal drawn
        while True:
            drawn += 1
            yield "abcd"

    documents = tokenizer.encode_documents(endless())
    assert drawn == 0
    needed = []
    for _ in range(7):
        next(documents)
        needed.append(drawn)
    assert needed == [3, 3, 3, 6, 6, 6, 9], "three documents of four characters are at least ten"


def test_vocabulary_size_is_exact_and_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 600
    assert train_tokenizer(iter(DOCUMENTS), vocab_size=600).sha256 == tokenizer.sha256
    assert train_tokenizer(DOCUMENTS, vocab_size=601).sha256 != tokenizer.sha256


def test_training_reads_a_bounded_uniform_sample_of_a_large_corpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        tokenizer_module, "TRAINING_CHARACTERS", 200 * tokenizer_module.CHUNK_CHARACTERS
    )
    documents = [f"{i:04d}" for i in range(2000)]
    sample = tokenizer_module._sample_chunks(documents)
    assert len(sample) == len(set(sample)) == 200
    assert sum(int(text) >= 1000 for text in sample) == pytest.approx(100, abs=30)


def refusal(documents: list[str], vocab_size: int) -> str:
    with pytest.raises(ConfigError) as raised:
        train_tokenizer(documents, vocab_size=vocab_size)
    prefix = f"data.vocab_size = {vocab_size}: a tokenizer cannot be trained on this corpus: "
    message = str(raised.value)
    assert message.startswith(prefix)
    return message.removeprefix(prefix)


@pytest.mark.parametrize(("vocab_size", "outside"), [(65536, 1), (260, -1)])
def test_a_vocabulary_that_cannot_be_trained_is_refused_with_the_nearest_one_that_can(
    vocab_size: int, outside: int
) -> None:
    message = refusal(DOCUMENTS, vocab_size)
    named = re.search(r"use at (?:most|least) (\d+)", message)
    assert named, message
    nearest = int(named[1])
    assert train_tokenizer(DOCUMENTS, vocab_size=nearest).vocab_size == nearest
    refusal(DOCUMENTS, nearest + outside)


@pytest.mark.parametrize("documents", [[], [""]])
def test_a_corpus_without_text_is_refused(documents: list[str]) -> None:
    assert refusal(documents, 400) == "it has no text; give inputs with text"


def test_text_that_is_none_is_named_before_the_library_sees_it() -> None:
    with pytest.raises(ConfigError, match=r"lone surrogate, .* at character 2: decode it as"):
        train_tokenizer([*DOCUMENTS, "ab\ud83d"], 400)


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.save(tmp_path) == "tokenizer.model"
    loaded = load_tokenizer(tmp_path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(DOCUMENTS[0]) == tokenizer.encode(DOCUMENTS[0])
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.content()[:100])
    with pytest.raises(ConfigError, match=r"tokenizer.model is not a readable sentencepiece model"):
        load_tokenizer(tmp_path)


def test_learned_pieces_are_all_but_the_first_ids_and_differ_in_their_text(
    tokenizer: Tokenizer,
) -> None:
    pieces = tokenizer.learned_pieces()
    assert [token for token, _ in pieces] == list(range(258, 600))
    assert len({text for _, text in pieces}) == len(pieces)
    assert all(tokenizer.decode([token]) == text for token, text in pieces)
