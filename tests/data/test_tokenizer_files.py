"""Tokenizers by file or folder, trained here or by somebody else."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from mc_ds.config import ConfigError
from mc_ds.data import load_tokenizer, train_tokenizer
from mc_ds.data.tokenizer import HFTokenizer, SentencePieceTokenizer
from tests.support import tiny_hf
from tests.support.text_inputs import some_texts

TEXTS = some_texts(300)


def foreign(**options: Any) -> bytes:
    """A model as the library trains it by default."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in TEXTS for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **{"vocab_size": 90, **options},
    )
    return model.getvalue()


def test_a_model_of_somebody_else_parts_documents_with_its_begin_or_end_token(
    tmp_path: Path,
) -> None:
    for name, options, token in (("b", {}, 1), ("e", {"bos_id": -1, "eos_id": 1}, 1)):
        path = tmp_path / f"{name}.model"
        path.write_bytes(foreign(**options))
        tokenizer = load_tokenizer(path)
        library = sentencepiece.SentencePieceProcessor(model_file=str(path))
        assert tokenizer.separator_id == token
        assert tokenizer.encode(TEXTS[7]) == library.encode(TEXTS[7])
        assert tokenizer.encode_many(TEXTS[:9], threads=1) == library.encode(TEXTS[:9])
        assert tokenizer.decode(tokenizer.encode_document("value_1 = 7")) == "value_1 = 7"
        assert tokenizer.learned_pieces()
        for piece, text in tokenizer.learned_pieces():
            assert tokenizer.encode(text) == [piece]


def test_a_model_without_a_token_that_parts_documents_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(foreign(bos_id=-1, eos_id=-1))
    with pytest.raises(ConfigError, match=r"x.model has neither a begin nor an end token"):
        load_tokenizer(path)


def test_single_characters_of_a_foreign_model_fall_back_to_bytes_or_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="no single token for 'q'"):
        SentencePieceTokenizer(foreign()).single("q")
    with_bytes = SentencePieceTokenizer(foreign(byte_fallback=True, vocab_size=340))
    assert with_bytes.single("\n") == with_bytes._processor.piece_to_id("<0x0A>")


def test_a_file_is_opened_by_its_name_and_a_dataset_by_its_folder(tmp_path: Path) -> None:
    ours = train_tokenizer(TEXTS, vocab_size=300)
    (tmp_path / "tokenizer").mkdir()
    ours.save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path).sha256 == ours.sha256
    renamed = tmp_path / "mine.model"
    renamed.write_bytes(ours.content())
    assert load_tokenizer(renamed).sha256 == ours.sha256
    other = HFTokenizer(tiny_hf.byte_level())
    assert load_tokenizer(tmp_path / other.save(tmp_path)).sha256 == other.sha256
    assert load_tokenizer(tmp_path).sha256 == other.sha256


@pytest.mark.parametrize("kind", ["ours", "json"])
def test_a_pickled_tokenizer_and_one_thread_encode_the_same(kind: str) -> None:
    tokenizer = (
        train_tokenizer(TEXTS, vocab_size=300)
        if kind == "ours"
        else HFTokenizer(tiny_hf.byte_level())
    )
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.sha256 == tokenizer.sha256
    assert copy.encode_many(TEXTS, threads=1) == tokenizer.encode_many(TEXTS)
    assert copy.encode_many([], threads=1) == []
