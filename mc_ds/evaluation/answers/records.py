"""Results of prompts: one record per prompt and way to read it, and their means by task.

Prompts are the independent units: every figure is a mean over prompts, with the standard error of
that mean. Differences are paired by prompt.

Legend: n prompts.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mc_ds.evaluation.streaming.records import Estimate, mean_of

ALL = "all tasks"
"""Name of the mean over tasks."""


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """What the model wrote after one prompt, read in one way."""

    task: str
    seq_len: int
    """Number of tokens of the prompt."""
    policy: str
    query_tokens: int | None
    """Query length of a retrieval policy, in tokens; None for other policies."""
    budget: float
    """The requested share of the prompt; 1 for `full`."""
    wc_length: int
    """Largest number of entries, including room for new tokens."""
    index: int
    """Number of the prompt within the task."""
    score: float
    """Share of the answers that the continuation contains."""
    hit_rate: float | None
    """Fraction of the facts needed that were read completely at LOD0 when the answer began; None if
    the answer depends on the whole text.
    """
    distractor_rate: float | None
    """The same fraction of the other facts; None if there are none."""
    answers: Sequence[str]
    written: str
    """The continuation."""
    settings: dict[str, float] = field(default_factory=dict)
    """Settings of the choice of blocks: see `PolicySpec.settings`."""

    def line(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps(asdict(self)) + "\n"


class Setting(NamedTuple):
    """A task at one length, and a way to read it."""

    task: str
    seq_len: int
    policy: str
    query_tokens: int | None
    budget: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The results of one setting."""

    setting: Setting
    wc_length: int
    score: Estimate
    of_full: float | None = None
    """Score divided by that of full context; None if that was not measured or is 0."""
    against_recency: Estimate | None = None
    """Score minus that of the recency window of the same budget, paired by prompt; None if recency
    was not measured.
    """
    wins: int | None = None
    """Number of prompts that scored higher than with recency."""
    losses: int | None = None
    """Number of prompts that scored lower than with recency."""
    hit_rate: float | None = None
    n: int


def summaries(records: Sequence[AnswerRecord]) -> list[Summary]:
    """Return the results of each setting, in the order of the records. If there are several tasks,
    the means over them follow, for every way in which all of them were read.
    """
    cells: dict[Setting, list[AnswerRecord]] = {}
    for record in records:
        key = record.task, record.seq_len, record.policy, record.query_tokens, record.budget
        cells.setdefault(Setting(*key), []).append(record)
    found = {setting: _summary(setting, cells) for setting in cells}
    tasks = list(dict.fromkeys(setting.task for setting in cells))
    ways = dict.fromkeys(setting._replace(task=ALL) for setting in cells)
    groups = {
        way: [found[key] for task in tasks if (key := way._replace(task=task)) in found]
        for way in (ways if len(tasks) > 1 else ())
    }
    complete = {way: group for way, group in groups.items() if len(group) == len(tasks)}
    return [*found.values(), *(_mean(way, complete) for way in complete)]


def _summary(setting: Setting, cells: dict[Setting, list[AnswerRecord]]) -> Summary:
    records = cells[setting]
    scores = np.array([record.score for record in records])
    summary = Summary(
        setting=setting,
        wc_length=records[0].wc_length,
        score=mean_of(scores),
        hit_rate=_average(record.hit_rate for record in records),
        n=len(records),
    )
    full = _paired(records, cells.get(_with(setting, "full")))
    if full is not None and full.any():
        summary = replace(summary, of_full=float(scores.mean() / full.mean()))
    recency = _paired(records, cells.get(_with(setting, "recency")))
    if recency is None:
        return summary
    difference = scores - recency
    return replace(
        summary,
        against_recency=mean_of(difference),
        wins=int((difference > 0).sum()),
        losses=int((difference < 0).sum()),
    )


def _with(setting: Setting, policy: str) -> Setting:
    """Return the setting in which a policy without a query reads the same task."""
    budget = 1.0 if policy == "full" else setting.budget
    return setting._replace(policy=policy, query_tokens=None, budget=budget)


def _paired(
    records: Sequence[AnswerRecord], others: Sequence[AnswerRecord] | None
) -> NDArray[np.float64] | None:
    """Return the scores of `others` on the prompts of `records`; None if some are missing."""
    scores = {record.index: record.score for record in others or ()}
    if any(record.index not in scores for record in records):
        return None
    return np.array([scores[record.index] for record in records])


def _mean(way: Setting, groups: dict[Setting, list[Summary]]) -> Summary:
    """Return the mean over tasks, whose errors are independent."""
    group, full = groups[way], groups.get(_with(way, "full"))
    score = _mean_estimate([summary.score for summary in group])
    against = [summary.against_recency for summary in group]
    summary = Summary(
        setting=way,
        wc_length=max(summary.wc_length for summary in group),
        score=score,
        hit_rate=_average(summary.hit_rate for summary in group),
        n=sum(summary.n for summary in group),
    )
    bound = 0.0 if full is None else _mean_estimate([summary.score for summary in full]).value
    if bound:
        summary = replace(summary, of_full=score.value / bound)
    measured = [estimate for estimate in against if estimate is not None]
    if len(measured) < len(group):
        return summary
    return replace(
        summary,
        against_recency=_mean_estimate(measured),
        wins=sum(summary.wins or 0 for summary in group),
        losses=sum(summary.losses or 0 for summary in group),
    )


def _mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    errors = [estimate.stderr for estimate in estimates if estimate.stderr is not None]
    count = len(estimates)
    return Estimate(
        sum(estimate.value for estimate in estimates) / count,
        math.hypot(*errors) / count if len(errors) == count else None,
    )


def _average(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else None


def answer_table(found: Sequence[Summary]) -> str:
    """Return a header and one line per summary. Scores are in percent, as RULER's tables have them;
    estimates show mean and standard error.
    """
    header = (
        f"{'task':>17}{'seq_len':>9}{'policy':>12}{'query_tokens':>13}{'budget':>8}"
        f"{'wc_length':>10}{'score':>14}{'of_full':>9}{'against_recency':>17}{'wins':>6}"
        f"{'losses':>7}{'hit_rate':>10}{'n':>5}"
    )
    return "\n".join([header, *map(_line, found)])


def _line(summary: Summary) -> str:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}"

    def percent(estimate: Estimate | None, form: str) -> str:
        if estimate is None:
            return "-"
        error = "" if estimate.stderr is None else f" ± {100 * estimate.stderr:.1f}"
        return f"{100 * estimate.value:{form}}{error}"

    task, seq_len, policy, query_tokens, budget = summary.setting
    score, against = percent(summary.score, ".1f"), percent(summary.against_recency, "+.1f")
    return (
        f"{task:>17}{seq_len:>9}{policy:>12}{query_tokens or '-':>13}{budget:>8.3g}"
        f"{summary.wc_length:>10}{score:>14}{cell(summary.of_full, '.3f'):>9}{against:>17}"
        f"{cell(summary.wins, 'd'):>6}{cell(summary.losses, 'd'):>7}"
        f"{cell(summary.hit_rate, '.3f'):>10}{summary.n:>5}"
    )
