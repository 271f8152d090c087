"""`SentencePieceTokenizer`: sentencepiece models, and their training.

Models trained here are BPE with byte fallback, and decode to exactly the text that was encoded,
including whitespace. Ids: 0 unknown (never produced, because of byte fallback), 1 the document
separator, 2..257 the bytes, then the learned pieces.
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
"""First id of a learned piece, after the unknown id, the separator and the bytes."""
TRAINING_CHARACTERS = 16_000_000
"""Maximum characters for training, sampled uniformly from a larger corpus."""
CHUNK_CHARACTERS = 2_000
"""Characters per training sample: many lines, so that pieces such as ":\\n" are learned."""
SPACE_SYMBOL = "\u2581"
"""Symbol that sentencepiece uses for a space. Where a text has the symbol itself, it is encoded as
bytes.
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
    """Return the digest of everything, except text and vocabulary size, that determines a trained
    model.
    """
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
    """Train a model with exactly `vocab_size` pieces. Deterministic.

    Raises ConfigError, naming `setting`, if the text is too small for so many pieces, or its
    alphabet too large for so few, and for a document with lone surrogates.
    """
    model = io.BytesIO()
    chunks = _sample_chunks(documents)
    if not any(chunks):
        raise ConfigError(
            f"{setting} = {vocab_size}: a tokenizer cannot be trained on this corpus: it has no"
            " text; give inputs with text"
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
            f"{setting} = {vocab_size}: a tokenizer cannot be trained on this corpus:"
            f" {_remedy(str(error))}"
        ) from None
    return SentencePieceTokenizer(model.getvalue())


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    For models trained here, `decode(encode(text)) == text` for every text. Others may normalise
    text and drop unknown characters; their separator is the begin token, or else the end token.
    """

    file_name = "tokenizer.model"
    library = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        ends = (self._processor.bos_id(), self._processor.eos_id())
        self.separator_id = next((token for token in ends if token >= 0), -1)
        self.end_ids = frozenset({self.separator_id, self._processor.eos_id()} - {-1})
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
        """Read a model file. Raises ConfigError if it is missing or damaged, or has neither begin
        nor end token.
        """
        try:
            tokenizer = cls(read_tokenizer_file(path))
        except (OSError, RuntimeError, IndexError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{path} is not a readable sentencepiece model ({reason}): delete its folder and"
                " make it again"
            ) from None
        if tokenizer.separator_id < 0:
            raise ConfigError(
                f"{path} has neither a begin nor an end token to separate documents: use another"
                " model, or its tokenizer.json"
            )
        return tokenizer

    def content(self) -> bytes:
        """Return the model as serialised by sentencepiece."""
        return self.model

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without a separator."""
        parts = self._parts(text)
        return self._joined(parts, map(self._processor.encode, parts))

    def encode_many(
        self, texts: Sequence[str], *, threads: Literal[1] | None = None
    ) -> list[list[int]]:
        """Return the token ids of each text, without separators."""
        parts = [self._parts(text) for text in texts]
        encoded = iter(
            self._processor.encode(
                [part for of_text in parts for part in of_text],
                num_threads=threads or len(os.sched_getaffinity(0)),
            )
        )
        return [self._joined(of_text, encoded) for of_text in parts]

    def _parts(self, text: str) -> list[str]:
        """Split a text at the space symbol, which sentencepiece would encode as a space."""
        require_text(text)
        return text.split(SPACE_SYMBOL) if self._exact else [text]

    def _joined(self, parts: Sequence[str], encoded: Iterator[list[int]]) -> list[int]:
        """Take the ids of each part from `encoded` and join them with the ids of the space
        symbol.
        """
        ids: list[int] = next(encoded)
        for _ in parts[1:]:
            ids += self._space_symbol_ids + next(encoded)
        return ids

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of token ids, without separators."""
        text: str = self._processor.decode(require_ids(ids, self.vocab_size))
        return text

    def single(self, character: str) -> int:
        """Return the piece of an ASCII character, or its byte if there is no such piece."""
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
        """Return (id, text) of the learned pieces.

        Of a model trained elsewhere, return those of several characters whose text encodes to that
        piece.
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
    """Translate sentencepiece's message to a cause and a remedy."""
    if limit := re.search(r"set it to a value <= (\d+)", message):
        return f"the text is too small: use at most {limit[1]}, or more text"
    if required := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return (
            f"its characters and the bytes already need {required[1]} pieces: use at least"
            f" {required[1]}"
        )
    return " ".join(message.split())


def _sample_chunks(documents: Iterable[str]) -> list[str]:
    """Return a uniform sample of the documents' chunks (all, if they fit), read in one pass."""
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
