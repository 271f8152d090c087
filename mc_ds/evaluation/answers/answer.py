"""Evaluate policies on prompts (`launch/evaluate.py --tasks ruler,stories`)."""

import sys
from collections.abc import Iterator
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.evaluation.answers.answering import Answering
from mc_ds.evaluation.answers.records import AnswerRecord, answer_table, summaries
from mc_ds.evaluation.measure import specs_of
from mc_ds.evaluation.report import access_lines, settings_lines
from mc_ds.evaluation.request import Request
from mc_ds.inference import load_bundle
from mc_ds.tasks.prompts import PROMPTS, PromptTask, TextSource
from mc_ds.weights.open import open_weights


def answer(
    bundle: str,
    request: Request,
    *,
    device: str,
    search: int | None = None,
    batch_size: int = 1,
) -> Iterator[str]:
    """Answer the prompts of every task at every requested length. Writes each record to
    `request.out` as soon as its batch is measured, one line of JSON each; yields a table per
    length.

    Raises ConfigError, before anything is measured, for a policy, length or corpus with which a
    task is impossible.
    """
    model = load_bundle(bundle, device=device)
    if model.tokenizer is None:
        raise ConfigError(f"{bundle} has no tokenizer, which prompts need: use another bundle")
    names = request.policies_for(model.config, has_lensnet=model.lensnet is not None)
    corpus = open_weights(bundle, verify=False).corpus(other=request.text)
    source = TextSource(model.tokenizer, corpus.val)
    tasks = [PromptTask(name, PROMPTS[name], source, seed=request.seed) for name in request.tasks]
    answering = Answering(
        model=model,
        specs=specs_of(names, request.retrieval(model.config)),
        budgets=request.shares(model.config.mc),
        focus=request.focus(model.config),
        seed=request.seed,
        search=search,
        batch_size=batch_size,
    )
    lengths = [length or model.config.mc.seq_len for length in request.seq_lens]
    for length in lengths:
        answering.check(tasks, length)
    request.out.unlink(missing_ok=True)
    for length in lengths:
        if "full" in names and not answering.reads_whole(length):
            print(
                f"warning: full is left out at {length} tokens, since the model was trained on"
                f" {model.config.mc.seq_len}",
                file=sys.stderr,
            )
        records = [
            record
            for task in tasks
            for record in _written(answering.run(task, range(request.samples), length), request.out)
        ]
        access = access_lines(record.policy for record in records) + settings_lines(records)
        yield "\n".join([answer_table(summaries(records)), *access, f"records: {request.out}"])


def _written(records: Iterator[AnswerRecord], path: Path) -> Iterator[AnswerRecord]:
    """Append each record to `path` before it is passed on."""
    for record in records:
        with path.open("a", encoding="utf-8") as file:
            file.write(record.line())
        yield record
