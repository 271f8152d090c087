"""A pretrained model's `tokenizer.json` serves everywhere that a tokenizer trained here does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_ds.config import ConfigError
from mc_ds.data import ShardWriter, TokenShards, train_tokenizer
from mc_ds.data.tokenizer import HFTokenizer, base, load_tokenizer
from mc_ds.tasks import TaskVocabulary, make_task
from tests.support import tiny_hf
from tests.tasks.test_tasks import check_answers, lengths

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\n▁"), max_size=60)


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return HFTokenizer(tiny_hf.byte_level())


def test_code_round_trips_and_shrinks(tokenizer: HFTokenizer) -> None:
    for text in tiny_hf.TEXT:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text) / 2


@given(text=TEXT)
def test_exact_round_trip_of_any_text(tokenizer: HFTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_special_tokens_never_come_from_text_and_decode_to_nothing(tokenizer: HFTokenizer) -> None:
    text = "<|endoftext|>x<|im_start|>"
    ids = tokenizer.encode_document(text)
    assert ids.dtype == np.int64
    assert ids[0] == tokenizer.separator_id == 0
    assert not set(ids[1:]) & {0, 1}
    assert tokenizer.decode(ids) == text


@settings(deadline=None)  # threads are started for every list
@given(texts=st.lists(TEXT | st.just("<|endoftext|>"), max_size=6), characters=st.integers(1, 99))
def test_several_texts_are_encoded_as_each_alone(
    tokenizer: HFTokenizer, texts: list[str], characters: int
) -> None:
    several = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_many(texts) == several
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "BATCH_CHARACTERS", characters)
        documents = list(tokenizer.encode_documents(iter(texts)))
    assert [ids.tolist() for ids in documents] == [
        [tokenizer.separator_id, *ids] for ids in several
    ]
    assert [(ids.dtype, ids.tolist()) for ids in map(tokenizer.encode_document, texts)] == [
        (ids.dtype, ids.tolist()) for ids in documents
    ]


def test_padding_and_begin_tokens_in_the_file_are_left_out_of_several_texts_too() -> None:
    content = tokenizers.Tokenizer.from_buffer(
        tiny_hf.byte_level(300, ("<|endoftext|>", "[X]"), "[X]")
    )
    content.enable_padding()
    content.enable_truncation(4)
    tokenizer = HFTokenizer(content.to_str().encode())
    texts = ["", "abcdefgh" * 9, "▁ a"]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_many(texts)] == texts
    assert tokenizer.encode_many(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_many([]) == []


@pytest.mark.parametrize(
    ("special", "begin", "separator"),
    [
        (("<|im_start|>", "<|endoftext|>"), None, 1),
        (("<|end_of_text|>", "<|begin_of_text|>"), None, 0),
        (("<|end_of_text|>", "<|begin_of_text|>"), "<|begin_of_text|>", 1),
        (("<|endoftext|>", "[X]"), "[X]", 1),
    ],
)
def test_documents_begin_with_what_the_file_puts_before_a_text_else_with_a_known_token(
    special: tuple[str, ...], begin: str | None, separator: int
) -> None:
    tokenizer = HFTokenizer(tiny_hf.byte_level(300, special, begin))
    assert tokenizer.separator_id == separator
    assert len(tokenizer.encode("a")) == 1, "it is put there for documents only"
    assert tokenizer.decode(tokenizer.encode_document("a b")) == "a b"


def test_a_model_has_finished_at_a_separator_and_at_special_tokens_that_end_a_turn() -> None:
    special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "[X]")
    tokenizer = HFTokenizer(tiny_hf.byte_level(300, special, "[X]"))
    assert tokenizer.separator_id == 3
    assert tokenizer.end_ids == {1, 2, 3}
    ordinary = HFTokenizer(tiny_hf.byte_level(300, ("<|endoftext|>",)))
    assert ordinary.end_ids == {ordinary.separator_id}


def test_a_file_without_a_token_that_parts_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tiny_hf.byte_level(300, ("<|im_start|>",)))
    with pytest.raises(
        ConfigError,
        match=(
            r"tokenizer.json has no special token to separate documents: add one of <\|endoftext\|>"
        ),
    ):
        load_tokenizer(tmp_path)


def test_save_and_load_keep_the_bytes(tokenizer: HFTokenizer, tmp_path: Path) -> None:
    assert tokenizer.save(tmp_path) == "tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_bytes() == tiny_hf.byte_level()
    loaded = load_tokenizer(tmp_path)
    assert loaded.sha256 == tokenizer.sha256 != HFTokenizer(tiny_hf.byte_level(701)).sha256
    assert loaded.encode(tiny_hf.TEXT[0]) == tokenizer.encode(tiny_hf.TEXT[0])


@pytest.mark.parametrize("damage", [b"", b"{}", tiny_hf.byte_level(300)[:-40]])
def test_a_damaged_file_is_told_in_one_line(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(damage)
    with pytest.raises(
        ConfigError, match=r"tokenizer.json is not a readable tokenizer \(.+\): copy it again$"
    ) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_is_read_by_the_file_it_has(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    with pytest.raises(
        ConfigError, match=r"has no tokenizer: should contain tokenizer.json or tokenizer.model"
    ):
        load_tokenizer(tmp_path)
    trained = train_tokenizer(tiny_hf.TEXT, 400)
    trained.save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == trained.sha256
    tokenizer.save(tmp_path)  # as in a Hugging Face folder of Llama 2
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


def test_padding_and_truncation_in_the_file_are_ignored() -> None:
    content = tokenizers.Tokenizer.from_buffer(tiny_hf.byte_level(300))
    content.enable_truncation(4)
    content.enable_padding(length=8)
    ids = HFTokenizer(content.to_str().encode()).encode("abcdefgh" * 9)
    assert HFTokenizer(tiny_hf.byte_level(300)).encode("abcdefgh" * 9) == ids


def test_learned_pieces_stand_for_themselves(tokenizer: HFTokenizer) -> None:
    pieces = tokenizer.learned_pieces()
    assert len(pieces) > 400
    assert [token for token, _ in pieces] == sorted(token for token, _ in pieces)
    assert all(token >= 2 + 256 and tokenizer.encode(text) == [token] for token, text in pieces)
    by_text = {text: token for token, text in pieces}
    assert "self" in by_text
    assert " self" in by_text, "pieces with a space are pieces of their own"


def test_pieces_that_share_a_text_are_told_apart() -> None:
    """Llama 2 reads a text as if a space stood before it: there `ab` and ` ab` decode alike, and
    only the latter is what encoding gives.
    """
    tokenizer = HFTokenizer(tiny_hf.byte_fallback())
    assert tokenizer.decode(tokenizer.encode("abc = é?\n")) == "abc = é?\n"
    by_text = {text: token for token, text in tokenizer.learned_pieces()}
    assert by_text["ab"] == tokenizer.encode("ab")[0]
    assert len(by_text) == len(tokenizer.learned_pieces())


def test_single_characters_fall_back_to_bytes_or_are_refused(tokenizer: HFTokenizer) -> None:
    assert [
        tokenizer.decode([tokenizer.single(character)]) for character in LETTERS + "=?\n"
    ] == list(LETTERS + "=?\n")
    fallback = HFTokenizer(tiny_hf.byte_fallback())
    assert fallback.single("\n") == 3 + 10
    assert len({fallback.single(character) for character in LETTERS + "=?\n"}) == 29
    without = json.loads(tiny_hf.byte_level(300))
    byte_of_newline = without["model"]["vocab"].pop("Ċ")
    without["model"]["vocab"]["unused"] = byte_of_newline
    without["model"]["merges"] = []
    with pytest.raises(ConfigError, match=r"no single token for '\\n'"):
        HFTokenizer(json.dumps(without).encode()).single("\n")


def test_padding_the_vocabulary_changes_no_encoding(tokenizer: HFTokenizer) -> None:
    padded = tokenizer.padded(tokenizer.vocab_size + 60)
    assert padded.vocab_size == tokenizer.vocab_size + 60
    assert padded.separator_id == tokenizer.separator_id
    assert padded.encode(tiny_hf.TEXT[0] + "<|unused_701|>") == tokenizer.encode(
        tiny_hf.TEXT[0] + "<|unused_701|>"
    )
    assert padded.decode([tokenizer.vocab_size]) == ""
    assert padded.learned_pieces() == tokenizer.learned_pieces()
    assert tokenizer.padded(tokenizer.vocab_size) is tokenizer
    with pytest.raises(
        ConfigError, match=r"a tokenizer with 700 ids does not fit a model with a vocabulary of 690"
    ):
        tokenizer.padded(690)


def test_tasks_are_written_in_its_pieces(tokenizer: HFTokenizer, tmp_path: Path) -> None:
    vocabulary = TaskVocabulary.of(tokenizer, 64)
    texts = [tokenizer.decode([key]) for key in vocabulary.keys]
    assert tokenizer.decode(vocabulary.letters) == LETTERS
    assert tokenizer.decode([vocabulary.equals, vocabulary.question, vocabulary.newline]) == "=?\n"
    assert len(set(texts)) == 64
    assert all(text.isalpha() and len(text) > 1 for text in texts)
    with ShardWriter(
        tmp_path / "shards", vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    ) as writer:
        for text in tiny_hf.TEXT:
            writer.append(tokenizer.encode_document(text))
    options: dict[str, Any] = dict(
        shards=TokenShards(tmp_path / "shards"), tokenizer=tokenizer, mc=lengths(), seed=0
    )
    task = make_task("recall", facts_by_stage=[24], num_keys=64, **options)
    for index in range(8):
        check_answers(task, task.sample(index), vocabulary)
