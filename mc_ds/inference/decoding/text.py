"""Token ids as a stream of text: whole characters only, and an end at a stop string.

A token may end in the middle of a character, and a stop string may span tokens: text is given out
when neither can change it any more.
"""

from collections.abc import Callable, Sequence

from mc_ds.config import ConfigError

Decode = Callable[[Sequence[int]], str]
BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""
LONGEST_CHARACTER = 4
"""Bytes of a character at most: more tokens than that do not complete one."""


class TextStream:
    """Turns ids into text piece by piece. `stopped` says that a stop string has come; it and what
    follows are not given out.
    """

    def __init__(
        self, decode: Decode, stop: Sequence[str] = (), *, before: Sequence[int] = ()
    ) -> None:
        """`before`: the last tokens before the stream: they decide how its first piece is written.
        Raises ConfigError for an empty stop.
        """
        if any(not text for text in stop):
            raise ConfigError(
                "stop = '' is an empty string, which would stop before anything is said: leave it "
                "out"
            )
        self._decode, self._stop = decode, tuple(stop)
        self._context, self._ids = list(before), list[int]()
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` makes certain; often empty."""
        self._ids.append(token)
        before = self._decode(self._context)
        text = self._decode([*self._context, *self._ids])[len(before) :]
        if text.endswith(BROKEN) and len(self._ids) < LONGEST_CHARACTER:
            return ""
        self._context, self._ids = self._ids, []
        return self._release(text)

    def close(self) -> str:
        """What was held back, when no more tokens come."""
        text = (
            self._decode([*self._context, *self._ids])[len(self._decode(self._context)) :]
            if self._ids
            else ""
        )
        self._ids = []
        said = self._release(text)
        held, self._held = ("" if self.stopped else self._held), ""
        return said + held

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


def _begun(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may have begun."""
    return next(
        (
            size
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )
