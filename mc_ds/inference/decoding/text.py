"""Token ids as a stream of text: whole characters only, and an end at a stop string.

A token may end in the middle of a character, and a stop string may span tokens: text is given out
when neither can change it any more.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no whole character (yet): one for each, or for
several.
"""
BEGUN = 3
"""Bytes of a character at most that can stand without its last one."""
LONGEST = 64
"""Tokens that are decoded again with the next one, where no character comes to its end."""
CONTEXT = 8
"""Of these, tokens that are then kept; more than a character has bytes."""


class TextStream:
    """Turns ids into text piece by piece: together what `decode` makes of all ids beyond what it
    made of those before. `stopped` says that a stop string has come; it and what follows are not
    given out.
    """

    def __init__(
        self, decode: Decode, stop: Sequence[str] = (), *, before: Sequence[int] = ()
    ) -> None:
        """`before`: the last tokens before the stream: they decide how its first piece is written.
        Where they end within a character, the stream gives it out as soon as it is whole.
        """
        self._decode, self._stop = decode, tuple(stop)
        self._context, self._ids = list(before), list[int]()
        self._known = decode(self._context)
        """What was given out of the text of `context` and `ids`."""
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return the text that `token` makes certain; often empty."""
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
        """Return what was held back, when no more tokens come."""
        new = self._beyond_known(self._decode([*self._context, *self._ids]))
        said = self._release(new)
        held, self._held = ("" if self.stopped else self._held), ""
        return said + held

    def _beyond_known(self, text: str) -> str:
        """Return what of `text` was not given out; from now on it is."""
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
    """Return the characters at the end of `text` that may stand for a character that has only
    begun.
    """
    return min(BEGUN, len(text) - len(text.rstrip(BROKEN)))


def _shared(one: str, other: str) -> int:
    """Return the characters at the beginning that two texts have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _begun(text: str, stop: str) -> int:
    """Return the characters at the end of `text` with which `stop` may have begun."""
    return next(
        (
            size
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )
