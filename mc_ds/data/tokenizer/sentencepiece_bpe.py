"""`SentencePieceTokenizer`: a BPE model with byte fallback that gives back exactly the text it
was given, whitespace included.

Ids: 0 unknown (never produced, thanks to byte fallback), 1 the document separator, 2..257 the
bytes, then the learned pieces.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from mc_ds.config.errors import ConfigError
from mc_ds.data.tokenizer.base import (
    Tokenizer,
    read_tokenizer_file,
    require_ids,
    require_text,
)

SEPARATOR_PIECE = "<doc>"
FIRST_LEARNED_ID = 2 + 256
"""Ids below are the unknown id, the separator and the bytes."""
TRAINING_CHARACTERS = 16_000_000
"""Characters a tokenizer is trained on at most, sampled uniformly where a corpus has more."""
CHUNK_CHARACTERS = 2_000
"""Size of the training samples; one chunk spans many lines, so that pieces such as ":\\n" are
learned.
"""
SPACE_SYMBOL = "\u2581"
"""What sentencepiece writes for a space: a text that contains the symbol itself is encoded there
as bytes.
"""

TRAINER_OPTIONS: dict[str, Any] = dict(
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
    character_coverage=0.9999,
    unk_id=0,
    bos_id=1,
    bos_piece=SEPARATOR_PIECE,
    eos_id=-1,
    pad_id=-1,
    max_sentence_length=4 * CHUNK_CHARACTERS + 1,
    num_threads=2,
    minloglevel=2,
)


def trainer_fingerprint() -> str:
    """Return the digest of all that decides a trained model besides text and vocabulary size."""
    parts = (
        sorted(TRAINER_OPTIONS.items()),
        TRAINING_CHARACTERS,
        CHUNK_CHARACTERS,
        sentencepiece.__version__,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, *, setting: str = "data.vocab_size"
) -> "SentencePieceTokenizer":
    """Train a model of exactly `vocab_size` pieces; the same documents give the same model.

    `setting` names the size in errors.

    Raises ConfigError where the text is too small for so many pieces, or its alphabet too large
    for so few, and for a document with lone surrogates.
    """
    model = io.BytesIO()
    chunks = _sample_chunks(documents)
    if not any(chunks):
        raise ConfigError(
            f"{setting} = {vocab_size} cannot be trained on this corpus: it has no text to"
            " learn from"
        )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            vocab_size=vocab_size,
            **TRAINER_OPTIONS,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"{setting} = {vocab_size} cannot be trained on this corpus: {_remedy(str(error))}"
        ) from None
    return SentencePieceTokenizer(model.getvalue())


class SentencePieceTokenizer(Tokenizer):
    """A model trained here, for which `decode(encode(text)) == text` for every text, or a model
    trained elsewhere, which may normalise text and drop unknown characters. The separator of such a
    model is its begin token, else its end token.
    """

    file_name = "tokenizer.model"
    library = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        ends = (self._processor.bos_id(), self._processor.eos_id())
        self.separator_id = next((token for token in ends if token >= 0), -1)
        self._exact = (
            self.separator_id >= 0
            and self._processor.id_to_piece(self.separator_id) == SEPARATOR_PIECE
        )
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._space_symbol_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()
        ]

    @classmethod
    def load(cls, path: Path) -> "SentencePieceTokenizer":
        """Read a model. Raises ConfigError where the file is missing or damaged, or has no token
        that parts documents.
        """
        try:
            tokenizer = cls(read_tokenizer_file(path))
        except (OSError, RuntimeError, IndexError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{path} is not a readable sentencepiece model ({reason}): delete its folder and"
                " make"
                " it again"
            ) from None
        if tokenizer.separator_id < 0:
            raise ConfigError(
                f"{path} has neither a begin nor an end token to part documents: use another"
                " model, or the tokenizer.json of its model"
            )
        return tokenizer

    def content(self) -> bytes:
        """Return the model; any sentencepiece program can read it."""
        return self.model

    def encode(self, text: str) -> list[int]:
        """Return token ids of `text`, without a separator."""
        parts = self._parts(text)
        return self._joined(parts, map(self._processor.encode, parts))

    def encode_many(
        self, texts: Sequence[str], *, threads: Literal[1] | None = None
    ) -> list[list[int]]:
        """Return token ids of each text, without separators."""
        parts = [self._parts(text) for text in texts]
        encoded = iter(
            self._processor.encode(
                [part for of_text in parts for part in of_text],
                num_threads=threads or len(os.sched_getaffinity(0)),
            )
        )
        return [self._joined(of_text, encoded) for of_text in parts]

    def _parts(self, text: str) -> list[str]:
        """Return what the library encodes exactly: it would take the space symbol for a space."""
        require_text(text)
        return text.split(SPACE_SYMBOL) if self._exact else [text]

    def _joined(self, parts: Sequence[str], encoded: Iterator[list[int]]) -> list[int]:
        """Return the next of `encoded` for each of the parts, with the space symbols between
        them.
        """
        ids: list[int] = next(encoded)
        for _ in parts[1:]:
            ids += self._space_symbol_ids + next(encoded)
        return ids

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of token ids; separators decode to nothing."""
        text: str = self._processor.decode(require_ids(ids, self.vocab_size))
        return text

    def single(self, character: str) -> int:
        """Return the piece of an ASCII character, or its byte where the text it was trained on
        hardly had it.
        """
        ids = self.encode(character)
        byte: int = self._processor.piece_to_id(f"<0x{ord(character):02X}>")
        if len(ids) == 1 and self.decode(ids) == character:
            return ids[0]
        if self._processor.is_byte(byte):
            return byte
        raise ConfigError(
            f"the tokenizer has no single token for {character!r}: tasks need one for a to z,"
            " '=', '?' and a line break"
        )

    def learned_pieces(self) -> list[tuple[int, str]]:
        """Return all pieces after the bytes; of somebody else's model those of several characters
        that encode to themselves.
        """
        if self._exact:
            learned = range(FIRST_LEARNED_ID, self.vocab_size)
            return [(token, self.decode([token])) for token in learned]
        pieces = [(token, self.decode([token])) for token in range(self.vocab_size)]
        return [
            (token, text)
            for token, text in pieces
            if len(text) > 1 and self.encode(text) == [token]
        ]


def _remedy(message: str) -> str:
    """Return what would be right, from sentencepiece's message."""
    if limit := re.search(r"set it to a value <= (\d+)", message):
        return f"its text has fewer pieces, use at most {limit[1]} or more text"
    if required := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"its characters and the bytes alone are as many pieces, use at least {required[1]}"
    return " ".join(message.split())


def _sample_chunks(documents: Iterable[str]) -> list[str]:
    """Return a uniform sample of fixed-size chunks of the documents (all of them where they fit),
    in one pass over any number of documents.
    """
    capacity = TRAINING_CHARACTERS // CHUNK_CHARACTERS
    rng = np.random.default_rng(0)
    sample: list[str] = []
    for seen, chunk in enumerate(_chunks(documents)):
        if seen < capacity:
            sample.append(chunk)
        elif (slot := int(rng.integers(seen + 1))) < capacity:
            sample[slot] = chunk
    return sample


def _chunks(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        require_text(text)
        for start in range(0, len(text), CHUNK_CHARACTERS):
            yield text[start : start + CHUNK_CHARACTERS]
