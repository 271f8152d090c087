"""The report's conclusions in words: what was trained, and whether LensNet works."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from reporting.evaluations import Evaluation, lens_less
from reporting.runs import Run
from reporting.statistics import LIKELY, Difference, paired

RIVALS = ("recency", "random", "uniform", "blind", "other_question")
"""Policies that LensNet must beat at equal length, including controls that hide the question."""
JUDGED = 100
"""Number of last steps over which the correlation is averaged."""


class Answer(Enum):
    """Whether LensNet works in this run."""

    YES = "Yes"
    NO = "No"
    UNCLEAR = "Not shown"
    ABSENT = "Not measured"


@dataclass(frozen=True)
class Verdict:
    """An answer, its reason in one sentence, and the evidence."""

    answer: Answer
    reason: str
    evidence: Sequence[str] = ()


def what_was_trained(run: Run) -> str:
    """Describe the run in two sentences."""
    dim, layers = run.setting("backbone.dim"), run.setting("backbone.num_layers")
    model = f"a decoder of {layers} layers, {dim} wide" if dim and layers else "a model"
    if run.setting("mc.num_random_variants"):
        model += (
            f", which reads {run.setting('mc.seq_len')} tokens as "
            f"{run.setting('mc.train_wc_length')} entries"
        )
    steps, tokens = f"{run.last_step:,} steps", run.last("train/tokens")
    wanted = run.setting("train.total_steps")
    if wanted and run.last_step < wanted:
        steps = f"{run.last_step:,} of {wanted:,} steps"
    text = f"{run.name}: {model}, trained for {steps}"
    text += f" ({tokens:,.0f} tokens)." if tokens else "."
    losses = run.series("val/loss")
    if len(losses) > 1:
        text += (
            f" Its held-out loss went from {losses[0][1]:.2f} to {losses[-1][1]:.2f} nats per"
            " token."
        )
    return text


def lensnet_works(run: Run, evaluations: Sequence[Evaluation]) -> Verdict:
    """Return the verdict from evaluations of the run's own model; without any, only the evidence
    from training.
    """
    correlation = correlation_in_words(run)
    evidence = [correlation] if correlation else []
    own = [evaluation for evaluation in evaluations if is_own(run, evaluation)]
    found = [
        (cell, rival, difference)
        for evaluation in own
        for cell, records in evaluation.cells().items()
        for rival in RIVALS
        if (difference := lens_less(records, rival)) is not None
    ]
    if not found:
        if not correlation:
            reason = "this run did not train a LensNet"
        else:
            reason = "no evaluation compares LensNet with other policies at equal length"
        return Verdict(Answer.ABSENT, reason, evidence)
    evidence = [difference_in_words(*item) for item in found] + evidence
    return Verdict(*_answer([(rival, difference) for _, rival, difference in found]), evidence)


def evaluation_verdict(records: Sequence[dict[str, Any]]) -> Verdict | None:
    """Return the verdict from records of one task, history length and context length; None without
    LensNet.
    """
    pairs = [(rival, lens_less(list(records), rival)) for rival in RIVALS]
    found = [(rival, difference) for rival, difference in pairs if difference is not None]
    return Verdict(*_answer(found)) if found else None


def _answer(found: Sequence[tuple[str, Difference]]) -> tuple[Answer, str]:
    better = [rival for rival, d in found if d.mean < 0 and d.chance < LIKELY]
    worse = [rival for rival, d in found if d.mean > 0 and d.chance < LIKELY]
    if worse:
        return Answer.NO, f"its contexts give a higher loss than {_names(worse)} at equal length"
    if len(better) == len(found):
        chance = max(d.chance for _, d in found)
        return Answer.YES, (
            f"its contexts give a lower loss than {_names(better)} at equal length (largest"
            f" p-value: {percent(chance)})"
        )
    same = [rival for rival, _ in found if rival not in better]
    return Answer.UNCLEAR, (
        f"on {found[0][1].n} sequences its loss does not differ significantly from that of"
        f" {_names(same)}"
    )


def is_own(run: Run, evaluation: Evaluation) -> bool:
    """Return whether an evaluation is of the run's own model, as far as its files tell."""
    if evaluation.model is None:
        return evaluation.path.name == "eval.json"
    return Path(evaluation.model).resolve().is_relative_to(run.folder.resolve())


def difference_in_words(cell: tuple[str, int, int], rival: str, difference: Difference) -> str:
    """Return a line about the difference between lens and a rival."""
    task, seq_len, wc_length = cell
    return (
        f"{task}, {wc_length} entries for {seq_len} tokens: lens {signed(difference)} nats"
        f" relative to {rival} ({difference.n} sequences; {difference.certainty})"
    )


def correlation_in_words(run: Run) -> str:
    """Return a line about LensNet's correlation in the last steps; empty if it was not trained."""
    control = dict(run.series("mc/preference_corr_lod_only"))
    points = [(step, value) for step, value in run.series("mc/preference_corr_mean")][-JUDGED:]
    both = [(value, control[step]) for step, value in points if step in control]
    if len(both) < 2:
        return ""
    ours, theirs = zip(*both, strict=True)
    difference = paired(ours, theirs)
    return (
        f"preference correlation over the last {len(both)} steps: {sum(ours) / len(both):+.3f}, "
        f"control {sum(theirs) / len(both):+.3f} (negative is right): difference "
        f"{signed(difference)}, {difference.certainty}"
    )


def signed(difference: Difference) -> str:
    """Format mean and standard error."""
    error = "" if difference.stderr is None else f" ± {difference.stderr:.3f}"
    return f"{difference.mean:+.3f}{error}"


def percent(share: float) -> str:
    """Format a share in percent, with one digit after the point."""
    return f"{share:.1%}" if share >= 0.001 else "less than 0.1%"


def _names(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:-1]) + f" and {unique[-1]}" if len(unique) > 1 else unique[0]
