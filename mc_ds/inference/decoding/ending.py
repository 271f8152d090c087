"""`Ending`: the conditions that end a generation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

from mc_ds.config import ConfigError


@dataclass(frozen=True)
class Ending:
    """Ends a generation after a number of tokens, or earlier at a stop string or token. Raises
    ConfigError for invalid values.
    """

    max_new_tokens: int
    stop: str | Sequence[str] = ()
    """Stop strings, one or several: the generation ends once one of them has been generated."""
    stop_ids: Sequence[int] = ()
    """Stop tokens: the generation ends after one of them."""

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, Integral) or self.max_new_tokens < 0:
            raise ConfigError(
                f"max_new_tokens = {self.max_new_tokens!r} is not a number of tokens: use 0 or more"
            )
        if not isinstance(self.stop, Iterable):
            raise ConfigError(
                f"stop = {self.stop!r} is not text: give a string or a list of strings"
            )
        if not isinstance(self.stop_ids, Iterable) or not all(
            isinstance(token, Integral) for token in self.stop_ids
        ):
            raise ConfigError(f"stop_ids = {self.stop_ids!r} are not tokens: give token ids")
        for text in self.stops:
            if not isinstance(text, str) or not text:
                raise ConfigError(
                    f"stop = {text!r} is not a stop string: give a non-empty string, or leave it "
                    "out"
                )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
