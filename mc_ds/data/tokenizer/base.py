"""`Tokenizer`: what the rest of the code knows of a tokenizer, whichever library it comes from."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mc_ds.config.errors import ConfigError
from mc_ds.storage import open_regular, replace_file

BATCH_CHARACTERS = 8_000_000
"""Characters that are encoded at once."""
MAX_FILE_BYTES = 256 << 20
"""Of a tokenizer's file: the largest that there are have a tenth of it."""


class Tokenizer(ABC):
    """Text to ids and back. Two tokenizers with equal `sha256` do the same."""

    file_name: ClassVar[str]
    """The one file that `save` writes, by which `load_tokenizer` knows the kind."""
    library: ClassVar[str]
    """Name of the package that encodes and decodes."""
    vocab_size: int
    """Ids are 0 .. vocab_size - 1."""
    separator_id: int
    """Stands before every document; never the result of encoding text."""
    sha256: str
    """Digest of the content of its file."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return token ids of `text`, without a separator. What looks like a special token in it is
        text like any other.
        """

    @abstractmethod
    def encode_many(
        self, texts: Sequence[str], *, threads: Literal[1] | None = None
    ) -> list[list[int]]:
        """Return what `encode` makes of each text, on as many threads as there are cores, or on
        one where `threads` is 1.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of token ids; separators and other special tokens decode to nothing."""

    @abstractmethod
    def single(self, character: str) -> int:
        """Return the one token of an ASCII character. Raises ConfigError where it takes several."""

    @abstractmethod
    def learned_pieces(self) -> list[tuple[int, str]]:
        """Return (id, text) of the pieces that were learned from text, first learned first; two
        pieces never have the same text.

        Bytes, special tokens and pieces that are not a whole characters by themselves are not
        among them.
        """

    @abstractmethod
    def content(self) -> bytes:
        """Return what its file holds."""

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return type(self), (self.content(),)

    def encode_document(self, text: str) -> NDArray[np.int64]:
        """Return the separator followed by the tokens of one document, [n] int64."""
        return self._document(self.encode(text))

    def encode_documents(self, texts: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        """Return the separator followed by the tokens of each document, [n] int64; about
        `BATCH_CHARACTERS` of text are drawn at once.
        """
        for batch in _batches(texts):
            for ids in self.encode_many(batch):
                yield self._document(ids)

    def _document(self, ids: list[int]) -> NDArray[np.int64]:
        return np.array([self.separator_id, *ids], dtype=np.int64)

    def save(self, folder: Path) -> str:
        """Write its file into `folder`, to be read by `load_tokenizer` or by programs of the
        library it comes from; return its name.
        """
        with replace_file(folder / self.file_name) as file:
            file.write(self.content())
        return self.file_name


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Return the texts in order, in lists of at least `BATCH_CHARACTERS` but for the last."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def read_tokenizer_file(path: Path) -> bytes:
    """Return the content of a tokenizer's file. Raises OSError for what is not a regular file, and
    ConfigError for one that is too large.
    """
    with open_regular(path, follow=True) as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{path} has more than {MAX_FILE_BYTES >> 20} MiB: it is not a tokenizer of a language"
            " model"
        )
    return content


def require_text(text: str) -> str:
    """Return a text that can be encoded. Raises ConfigError for what is none: lone surrogates stand
    for bytes or halves of characters that were not decoded.
    """
    if not isinstance(text, str):
        raise ConfigError(f"text = {text!r} is not text: give a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text has {text[error.start]!r}, a lone surrogate, as its character"
            f" {error.start}: decode it as UTF-8"
        ) from None
    return text


def require_ids(ids: Iterable[Any], vocab_size: int) -> list[int]:
    """Return token ids as a list. Raises ConfigError for anything that is not an id of the
    vocabulary.
    """
    try:
        found = [index(token) for token in ids]
    except TypeError:
        raise ConfigError(
            f"ids = {str(ids)[:80]!r} are not token ids: give a sequence of whole numbers"
        ) from None
    for token in found:
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"token id {str(token)[:40]} is not in the vocabulary: ids are 0 to"
                f" {vocab_size - 1}"
            )
    return found
