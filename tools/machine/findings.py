"""The findings of checks, and the table of all findings."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

PROBE_PREFIX = "DOCTOR "
"""Beginning of the line with a probe's report."""


class Status(IntEnum):
    """Severity: training works; works, but not well or not everywhere; does not work."""

    OK = 0
    WARN = 1
    FAIL = 2


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    status: Status
    subject: str
    """What was checked: one or two words."""
    found: str
    fix: str = ""
    """What to do about it; empty where nothing needs to be done."""


Check = Callable[[], Iterable[Finding]]


def examine(checks: Iterable[tuple[str, Check]]) -> list[Finding]:
    """Run every check, whatever the others find. An exception in a check is a failure of its
    subject.
    """
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
                    f"cannot be checked: {what[:300]}",
                    "run what the check calls by itself, and mend that",
                )
            )
    return findings


def table(findings: Iterable[Finding]) -> str:
    """Return all findings, one per line with the fix below, and the number of warnings and
    failures.
    """
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
