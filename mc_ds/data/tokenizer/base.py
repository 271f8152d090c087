"""`Tokenizer`: the interface of all tokenizers, whichever library implements them."""

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
"""Characters encoded at once."""
MAX_FILE_BYTES = 256 << 20
"""Size limit of a tokenizer file, ten times the largest in use."""


class Tokenizer(ABC):
    """Converts text to token ids and back. Tokenizers with equal `sha256` behave identically."""

    file_name: ClassVar[str]
    """The file that `save` writes; `load_tokenizer` recognises the class by it."""
    library: ClassVar[str]
    """Name of the package that encodes and decodes."""
    vocab_size: int
    """Ids are 0 .. vocab_size - 1."""
    separator_id: int
    """Id that precedes every document; encoding text never produces it."""
    end_ids: frozenset[int]
    """Ids after which a model has finished what it writes: of the separator, and of special tokens
    that end a text or a turn.
    """
    sha256: str
    """Digest of the tokenizer file."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without a separator.

        The names of special tokens in `text` are encoded like ordinary text.
        """

    @abstractmethod
    def encode_many(
        self, texts: Sequence[str], *, threads: Literal[1] | None = None
    ) -> list[list[int]]:
        """Apply `encode` to each text, with one thread per core, or one in all if `threads`
        is 1.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of token ids, without separators and other special tokens."""

    @abstractmethod
    def single(self, character: str) -> int:
        """Return the token of an ASCII character. Raises ConfigError if it needs several tokens."""

    @abstractmethod
    def learned_pieces(self) -> list[tuple[int, str]]:
        """Return (id, text) of the pieces learned from text, in the order learned; texts are
        unique.

        Leaves out bytes, special tokens, and pieces that are only part of a character.
        """

    @abstractmethod
    def content(self) -> bytes:
        """Return the content of the tokenizer file."""

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return type(self), (self.content(),)

    def encode_document(self, text: str) -> NDArray[np.int64]:
        """Return the separator followed by the tokens of one document, [n] int64."""
        return self._document(self.encode(text))

    def encode_documents(self, texts: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        """Yield the separator followed by the tokens, [n] int64, of each document.

        Reads about BATCH_CHARACTERS of `texts` at once.
        """
        for batch in _batches(texts):
            for ids in self.encode_many(batch):
                yield self._document(ids)

    def _document(self, ids: list[int]) -> NDArray[np.int64]:
        return np.array([self.separator_id, *ids], dtype=np.int64)

    def save(self, folder: Path) -> str:
        """Write the tokenizer file into `folder` and return its name.

        It is in the library's own format, readable by `load_tokenizer` and other programs.
        """
        with replace_file(folder / self.file_name) as file:
            file.write(self.content())
        return self.file_name


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in order, in lists of at least BATCH_CHARACTERS (the last may be shorter)."""
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
    """Return a tokenizer file's content. Raises OSError if it is not a regular file, ConfigError if
    it is too large.
    """
    with open_regular(path, follow=True) as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB, too large for a tokenizer: give the"
            " path of a tokenizer file"
        )
    return content


def require_text(text: str) -> str:
    """Return `text` unchanged. Raises ConfigError if it is not a str or has a lone surrogate, which
    Python uses for bytes that it could not decode.
    """
    if not isinstance(text, str):
        raise ConfigError(f"text = {text!r} is not text: give a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text has a lone surrogate, {text[error.start]!r}, at character {error.start}:"
            " decode it as UTF-8"
        ) from None
    return text


def require_ids(ids: Iterable[Any], vocab_size: int) -> list[int]:
    """Return token ids as a list of int. Raises ConfigError for anything outside the vocabulary."""
    try:
        found = [index(token) for token in ids]
    except TypeError:
        raise ConfigError(
            f"ids = {str(ids)[:80]!r} are not token ids: give a sequence of integers"
        ) from None
    for token in found:
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"token id {str(token)[:40]} is not in the vocabulary: ids are 0 to"
                f" {vocab_size - 1}"
            )
    return found
