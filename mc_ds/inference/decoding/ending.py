"""When a generation ends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

from mc_ds.config import ConfigError


@dataclass(frozen=True)
class Ending:
    """When a generation ends: after a number of tokens, or earlier. Raises ConfigError for bad
    values.
    """

    max_new_tokens: int
    stop: str | Sequence[str] = ()
    """A string, or several: the generation ends when one of them has been written."""
    stop_ids: Sequence[int] = ()
    """Tokens after which it ends."""

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, Integral) or self.max_new_tokens < 0:
            raise ConfigError(
                f"max_new_tokens = {self.max_new_tokens!r} is not a number of tokens: use 0 or more"
            )
        if not isinstance(self.stop, Iterable):
            raise ConfigError(f"stop = {self.stop!r} is not text: give a string, or several")
        if not isinstance(self.stop_ids, Iterable) or not all(
            isinstance(token, Integral) for token in self.stop_ids
        ):
            raise ConfigError(f"stop_ids = {self.stop_ids!r} are not tokens: give token ids")
        for text in self.stops:
            if not isinstance(text, str) or not text:
                raise ConfigError(
                    f"stop = {text!r} is not text that could be written: give a string that is not "
                    "empty, or leave it out"
                )

    @property
    def stops(self) -> tuple[str, ...]:
        """All strings of `stop`."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
