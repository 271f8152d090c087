"""Runs checks, and formats their findings as a table."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

PROBE_PREFIX = "DOCTOR "
"""Prefix of the line with a probe's report."""


class Status(IntEnum):
    """Severity: OK, training works; WARN, it works with limitations; FAIL, it does not work."""

    OK = 0
    WARN = 1
    FAIL = 2


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    status: Status
    subject: str
    """What was checked, in one or two words."""
    found: str
    """What was found."""
    fix: str = ""
    """What to do about it; empty if nothing."""


Check = Callable[[], Iterable[Finding]]


def examine(checks: Iterable[tuple[str, Check]]) -> list[Finding]:
    """Run all checks and return their findings. An exception in a check becomes a FAIL."""
    findings: list[Finding] = []
    for subject, check in checks:
        try:
            findings += check()
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            findings.append(
                Finding(
                    Status.FAIL,
                    subject,
                    f"the check failed with {what[:300]}",
                    "fix the cause of this exception, then try again",
                )
            )
    return findings


def table(findings: Iterable[Finding]) -> str:
    """Format findings: one line each, with the fix below, and a line with counts at the end."""
    findings = list(findings)
    width = max((len(finding.subject) for finding in findings), default=0)
    lines: list[str] = []
    for finding in findings:
        lines.append(
            f"{finding.status.name.lower():<4}  {finding.subject:<{width}}  {finding.found}"
        )
        if finding.fix:
            lines.append(f"{'':<4}  {'':<{width}}  -> {finding.fix}")
    counts = {status: sum(finding.status == status for finding in findings) for status in Status}
    lines.append(
        f"{counts[Status.OK]} ok, {counts[Status.WARN]} warnings, {counts[Status.FAIL]} failures"
    )
    return "\n".join(lines)
