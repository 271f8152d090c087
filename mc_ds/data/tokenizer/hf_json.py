"""`HFTokenizer`: the `tokenizer.json` of a pretrained model, run by the `tokenizers` library.

The document separator is the special token that the file's post-processor puts before a text
(Llama: a begin token), or else the first of `SEPARATORS` that the file has (GPT-2, SmolLM: an end
token).
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray

from mc_ds.config.errors import ConfigError
from mc_ds.data.tokenizer.base import (
    Tokenizer,
    read_tokenizer_file,
    require_ids,
    require_text,
)

SEPARATORS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "<|bos|>",
    "<s>",
    "<bos>",
    "</s>",
    "<eos>",
)
"""Special tokens that models use between documents, in order of preference."""
ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "</s>",
    "<eos>",
)
"""Special tokens with which models end a text or a turn of a dialogue."""
MAX_UNUSED = 1 << 16
"""Maximum rows of a model's embedding beyond the ids of its tokenizer (sizes are rounded up)."""


class HFTokenizer(Tokenizer):
    """A tokenizer from a `tokenizer.json`, whose content is kept byte for byte.

    `decode(encode(text)) == text` if the vocabulary covers all characters of `text` (bytes, for a
    byte-level tokenizer); the library silently drops others. Raises ConfigError if there is no
    document separator.
    """

    file_name = "tokenizer.json"
    library = "tokenizers"

    def __init__(self, content: bytes, source: str = "tokenizer.json") -> None:
        """Parse `content`. Raises ConfigError, naming `source`, if it is not a tokenizer."""
        self._source = source
        with self._named_errors():
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self._content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = 1 + max(
            self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1
        )
        special = self._special_ids()
        self.separator_id = self._find_separator(source, special)
        ends = (self._tokenizer.token_to_id(name) for name in ENDS)
        self.end_ids = frozenset(special.intersection([self.separator_id, *ends]))
        self._tokenizer.encode_special_tokens = True  # encode "<|endoftext|>" in a text as text

    @classmethod
    def load(cls, path: Path) -> "HFTokenizer":
        """Read a tokenizer file. Raises ConfigError if it is missing or damaged."""
        try:
            return cls(read_tokenizer_file(path), str(path))
        except OSError as error:
            raise ConfigError(
                f"{path} is not a readable tokenizer ({error.strerror}): copy it again"
            ) from None

    @property
    def separator(self) -> str:
        """The separator as text."""
        return str(self._tokenizer.id_to_token(self.separator_id))

    def content(self) -> bytes:
        """Return the file as it was read."""
        return self._content

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without special tokens."""
        require_text(text)
        with self._named_errors():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(
        self, texts: Sequence[str], *, threads: Literal[1] | None = None
    ) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        batches = [[text] for text in texts] if threads == 1 else [list(texts)]
        for text in texts:
            require_text(text)
        with self._named_errors():
            return [
                encoding.ids
                for batch in batches
                for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ]

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._tokenizer.decode(require_ids(ids, self.vocab_size), skip_special_tokens=True)

    def single(self, character: str) -> int:
        """Return the token of this character, or its byte token in a vocabulary with byte
        fallback.
        """
        ids = self.encode(character)
        if len(ids) == 1 and self.decode(ids) == character:
            return ids[0]
        byte = self._tokenizer.token_to_id(f"<0x{ord(character):02X}>")
        if byte is None:
            raise ConfigError(
                f"the tokenizer has no single token for {character!r}: tasks need one for a to z,"
                " '=', '?' and a line break"
            )
        return byte

    def learned_pieces(self) -> list[tuple[int, str]]:
        """Return (id, text) of the pieces of several characters whose text encodes to that piece.

        This leaves out parts of characters. It also makes texts unique: if the tokenizer drops the
        space before a first word, only one of the pieces with and without space is kept.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        pieces = [
            (token, self.decode([token])) for token in range(self.vocab_size) if token not in added
        ]
        return [
            (token, text)
            for token, text in pieces
            if len(text) > 1 and self.encode(text) == [token]
        ]

    def padded(self, vocab_size: int) -> "HFTokenizer":
        """Return this tokenizer extended to `vocab_size` ids with unused special tokens.

        Needed for models whose embedding has more rows than their tokenizer has ids. Raises
        ConfigError if the tokenizer has more ids than `vocab_size`, or if its ids have gaps.
        """
        if vocab_size == self.vocab_size:
            return self
        if vocab_size - self.vocab_size > MAX_UNUSED:
            raise self._does_not_fit(vocab_size)
        wider = tokenizers.Tokenizer.from_buffer(self._content)
        names = [f"<|unused_{token}|>" for token in range(self.vocab_size, vocab_size)]
        wider.add_special_tokens(
            [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
        )
        padded = HFTokenizer(wider.to_str(pretty=True).encode())
        if padded.vocab_size != vocab_size:
            raise self._does_not_fit(vocab_size)
        return padded

    def _does_not_fit(self, vocab_size: int) -> ConfigError:
        return ConfigError(
            f"a tokenizer with {self.vocab_size} ids does not fit a model with a vocabulary of"
            f" {vocab_size}: use the model's own tokenizer.json"
        )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Convert any error of the library to ConfigError. It raises bare Exception, and panics if
        matching a tokenizer's pattern takes too many steps.
        """
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ConfigError(
                f"{self._source} is not a readable tokenizer ({' '.join(str(error).split())}): copy"
                " it again"
            ) from None

    def _special_ids(self) -> set[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token for token, content in added.items() if content.special}

    def _find_separator(self, source: str, special: set[int]) -> int:
        with self._named_errors():
            prefix = self._tokenizer.encode("", add_special_tokens=True).ids
        known = [self._tokenizer.token_to_id(name) for name in SEPARATORS]
        for token in (*prefix[:1], *known):
            if token in special:
                return token
        raise ConfigError(
            f"{source} has no special token to separate documents: add one of"
            f" {', '.join(SEPARATORS)} to its added_tokens"
        )
