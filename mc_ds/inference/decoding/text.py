"""Turns a stream of token ids into text: whole characters only, ending at a stop string.

A token may end in the middle of a character, and a stop string may span tokens. Text is held back
until neither can change it.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
BROKEN = "\ufffd"
"""Replacement character that decoders write for the bytes of an incomplete character, one for each
or for several.
"""
BEGUN = 3
"""Most bytes of a UTF-8 character that is still incomplete."""
LONGEST = 64
"""Number of tokens after which the context of decoding is shortened, even if no character is
complete.
"""
CONTEXT = 8
"""Tokens of it that are kept then; more than a character has bytes."""


class TextStream:
    """Turns ids into pieces of text, which together are the text that all ids add to that of the
    tokens before.

    `stopped` is True once a stop string was found; it and what follows are not returned.
    """

    def __init__(
        self, decode: Decode, stop: Sequence[str] = (), *, before: Sequence[int] = ()
    ) -> None:
        """`before` are the tokens that precede the stream; they affect its first piece. If they end
        within a character, the stream returns it once it is complete.
        """
        self._decode, self._stop = decode, tuple(stop)
        self._context, self._ids = list(before), list[int]()
        self._known = decode(self._context)
        """The part of the text of `context` and `ids` that was returned."""
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return the text that can no longer change after `token`; often empty."""
        self._ids.append(token)
        text = self._decode([*self._context, *self._ids])
        begun = _marks(text)
        new = self._beyond_known(text[: len(text) - begun])
        own = self._decode(self._ids)
        if own and not begun:
            self._context, self._ids, self._known = self._ids, [], own
        elif len(self._ids) > LONGEST:
            self._context, self._ids = self._ids[-CONTEXT:], []
            text = self._decode(self._context)
            self._known = text[: len(text) - begun]
        return self._release(new)

    def close(self) -> str:
        """Return the text held back so far; no more tokens follow."""
        new = self._beyond_known(self._decode([*self._context, *self._ids]))
        said = self._release(new)
        held, self._held = ("" if self.stopped else self._held), ""
        return said + held

    def _beyond_known(self, text: str) -> str:
        """Return the part of `text` that was not returned before, and record it as returned."""
        new = text[_shared(self._known, text) :]
        if new:
            self._known = text
        return new

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            said, self._held = self._held[: min(found)], ""
            return said
        keep = max((_begun(self._held, stop) for stop in self._stop), default=0)
        said, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return said


def _marks(text: str) -> int:
    """Return the number of characters at the end of `text` that may belong to an incomplete
    character.
    """
    return min(BEGUN, len(text) - len(text.rstrip(BROKEN)))


def _shared(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _begun(text: str, stop: str) -> int:
    """Return the number of characters at the end of `text` that may be the beginning of `stop`."""
    return next(
        (
            size
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )
