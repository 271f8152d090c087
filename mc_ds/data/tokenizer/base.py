"""`Tokenizer`: what the rest of the code knows of a tokenizer, whichever library it comes from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray


class Tokenizer(ABC):
    """Text to ids and back. Two tokenizers with equal `sha256` do the same."""

    file_name: ClassVar[str]
    """The one file that `save` writes, by which `load_tokenizer` knows the kind."""
    vocab_size: int
    """Ids are 0 .. vocab_size - 1."""
    separator_id: int
    """Stands before every document; never the result of encoding text."""
    sha256: str
    """Digest of the content of its file."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without a separator. What looks like a special token in it is text like any other."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Text of token ids; separators and other special tokens decode to nothing."""

    @abstractmethod
    def single(self, character: str) -> int:
        """The one token of an ASCII character. Raises ConfigError where it takes several."""

    @abstractmethod
    def learned_pieces(self) -> list[tuple[int, str]]:
        """(id, text) of the pieces that were learned from text, first learned first; two pieces never have the same text.

        Bytes, special tokens and pieces that are not whole characters by themselves are not among them.
        """

    @abstractmethod
    def content(self) -> bytes:
        """What its file holds."""

    def encode_document(self, text: str) -> NDArray[np.int64]:
        """The separator followed by the tokens of one document, [n] int64."""
        return np.array([self.separator_id, *self.encode(text)], dtype=np.int64)

    def save(self, folder: Path) -> str:
        """Writes its file into `folder`, to be read by `load_tokenizer` or by programs of the library it comes from; returns its name."""
        (folder / self.file_name).write_bytes(self.content())
        return self.file_name
