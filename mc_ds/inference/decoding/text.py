"""Convert a stream of token ids to text: whole characters only, ending at a stop string.

A token may end in the middle of a character, and a stop string may span tokens. So text is held
back as long as a later token could change it or complete a stop string.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
BROKEN = "\ufffd"
"""Replacement character that decoders emit for the bytes of an incomplete character, one per byte
or one for several.
"""
MAX_INCOMPLETE = 3
"""Largest number of bytes of an incomplete UTF-8 character."""
LONGEST = 64
"""Number of tokens after which the decoded context is shortened even within a character."""
CONTEXT = 8
"""Number of tokens that are kept then; more than a character has bytes."""


class TextStream:
    """Converts ids to pieces of text. Concatenated, the pieces are the text that the ids add after
    the preceding tokens.

    `stopped` becomes True once a stop string was found; the stop string and any text after it are
    not returned.
    """

    def __init__(
        self, decode: Decode, stop: Sequence[str] = (), *, before: Sequence[int] = ()
    ) -> None:
        """`before` are the tokens that precede the stream; they can affect its first piece. If they
        end within a character, the stream returns that character once it is complete.
        """
        self._decode, self._stop = decode, tuple(stop)
        self._context, self._ids = list(before), list[int]()
        self._known = decode(self._context)
        """The part of the text of `_context` and `_ids` that was already returned."""
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token, and return the text that later tokens can no longer change; often empty."""
        self._ids.append(token)
        text = self._decode([*self._context, *self._ids])
        incomplete = _incomplete_length(text)
        new = self._new_part(text[: len(text) - incomplete])
        own = self._decode(self._ids)
        if own and not incomplete:
            self._context, self._ids, self._known = self._ids, [], own
        elif len(self._ids) > LONGEST:
            self._context, self._ids = self._ids[-CONTEXT:], []
            text = self._decode(self._context)
            self._known = text[: len(text) - incomplete]
        return self._release(new)

    def close(self) -> str:
        """Return the text held back so far. Call it after the last token."""
        new = self._new_part(self._decode([*self._context, *self._ids]))
        released = self._release(new)
        held, self._held = ("" if self.stopped else self._held), ""
        return released + held

    def _new_part(self, text: str) -> str:
        """Return the part of `text` that was not yet returned, and record it as returned."""
        new = text[_common_prefix(self._known, text) :]
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
            released, self._held = self._held[: min(found)], ""
            return released
        keep = max((_stop_prefix_length(self._held, stop) for stop in self._stop), default=0)
        released, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return released


def _incomplete_length(text: str) -> int:
    """Return the number of characters at the end of `text` that may belong to an incomplete
    character.
    """
    return min(MAX_INCOMPLETE, len(text) - len(text.rstrip(BROKEN)))


def _common_prefix(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _stop_prefix_length(text: str, stop: str) -> int:
    """Return the number of characters at the end of `text` that may be the beginning of `stop`."""
    return next(
        (
            size
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )
