"""`Fault`, an error in the input text, and `Faults`, which counts them."""

from collections import Counter
from dataclasses import dataclass, field

EXAMPLES = 3
"""Messages kept for each kind of fault; the rest are only counted."""
BY_RULE = frozenset({"binary", "empty"})
"""Reasons for which a file is only skipped and counted, even with `--on_error fail`."""


class Fault(Exception):
    """Input that cannot be read as text. `reason` is its kind; the message is one line."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Faults:
    """Counts faults, and keeps some messages of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    """Number by reason; includes what is skipped by rule, such as duplicates."""
    examples: list[tuple[str, str]] = field(default_factory=list)
    """Reason and message of the first `EXAMPLES` faults of each reason."""

    def add(self, fault: Fault) -> None:
        """Count one fault."""
        self.counts[fault.reason] += 1
        self._keep(fault.reason, str(fault))

    def merge(self, counts: dict[str, int], examples: list[tuple[str, str]]) -> None:
        """Add the counts and examples of another process."""
        self.counts.update(counts)
        for reason, message in examples:
            self._keep(reason, message)

    def _keep(self, reason: str, message: str) -> None:
        if sum(kept == reason for kept, _ in self.examples) < EXAMPLES:
            self.examples.append((reason, message))


def in_words(counts: Counter[str]) -> str:
    """Return the counts as a phrase: "2 binary, 3 hidden"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()) if count)
