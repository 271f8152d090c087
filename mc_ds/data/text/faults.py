"""What is wrong with an input, and how faults are counted."""

from collections import Counter
from dataclasses import dataclass, field

EXAMPLES = 3
"""Faults of one kind that are told in full."""
BY_RULE = frozenset({"binary", "empty"})
"""Reasons for which a file is left out and counted whatever `--on_error` says."""


class Fault(Exception):
    """Something that cannot be read as text: `reason` is its kind, the message one line."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Faults:
    """Counted faults."""

    counts: Counter[str] = field(default_factory=Counter)
    """By reason, also of what is left out by rule and is no fault."""
    examples: list[tuple[str, str]] = field(default_factory=list)
    """The first `EXAMPLES` faults of each reason: reason and message."""

    def add(self, fault: Fault) -> None:
        """Count one fault."""
        self.counts[fault.reason] += 1
        self._keep(fault.reason, str(fault))

    def merge(self, counts: dict[str, int], examples: list[tuple[str, str]]) -> None:
        """Count the faults of another process."""
        self.counts.update(counts)
        for reason, message in examples:
            self._keep(reason, message)

    def _keep(self, reason: str, message: str) -> None:
        if sum(kept == reason for kept, _ in self.examples) < EXAMPLES:
            self.examples.append((reason, message))


def in_words(counts: Counter[str]) -> str:
    """Return the counts as part of a line: "3 hidden, 2 binary"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()) if count)
