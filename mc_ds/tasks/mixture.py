"""The tasks of a run over one split of the corpus: the training mixture, and the tasks of
validation and evaluation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mc_ds.config import ConfigError, MCConfig, RunConfig
from mc_ds.config.data import RECALL_TASKS
from mc_ds.data import Domain, LanguageModelSource, RunData, TrainingSource
from mc_ds.data.sampling.epochs import repetition
from mc_ds.data.source import left_out, windows_of
from mc_ds.tasks import (
    FAMILIES,
    CorpusTask,
    DomainsTask,
    Family,
    MixedSource,
    Task,
    TaskSource,
    facts_for,
    make_family,
    make_task,
)
from mc_ds.tasks.prompts import PROMPTS, AnsweredPrompts, PromptTask, TextSource
from mc_ds.tasks.registry import check_task


def make_source(config: RunConfig, data: RunData, domains: Sequence[Domain]) -> TrainingSource:
    """Return the run's mixture of tasks over `domains`. Raises ConfigError for an unknown task or
    lengths that do not fit it.
    """
    parts: list[tuple[float, TrainingSource]] = []
    for name, share in config.data.tasks.items():
        options = _staged_options(name, config, held_out=False)
        task = _task(name, config, data, domains, seed=config.seed, **options)
        parts.append((share, TaskSource(task)))
    return parts[0][1] if len(parts) == 1 else MixedSource(parts, seed=config.seed)


def check_tasks(config: RunConfig) -> None:
    """Raise ConfigError if a task of the mixture does not fit the run's lengths. Needs no data."""
    for name in config.data.tasks:
        if name not in PROMPTS:  # what those need depends on the tokenizer
            check_task(name, config.mc, **_staged_options(name, config, held_out=False))


def text_sources(
    config: RunConfig, data: RunData, domains: Sequence[Domain]
) -> dict[str, TrainingSource]:
    """Return sources of plain text, keyed by the name of their domain."""
    return {domain.name: _text(config, data, domain, seed=config.seed) for domain in domains}


def reading_lines(config: RunConfig, data: RunData, epochs: Mapping[str, float]) -> list[str]:
    """Return lines that tell which training text is left out, and which the run repeats often.
    `epochs` is the number of passes over each part.
    """
    packed = config.data if "corpus" in config.data.tasks else None
    lines = [
        f"data: {domain.name}: without {rest}"
        for domain in data.train
        if packed is not None
        and (rest := left_out(domain.shards, packed, seq_len=config.mc.seq_len, cache=data.cache))
        is not None
    ]
    repeated = repetition(epochs, steps=config.train.total_steps)
    return [*lines, *([repeated] if repeated is not None else [])]


def run_task(
    name: str, config: RunConfig, data: RunData, domains: Sequence[Domain], *, seed: int
) -> Task:
    """Return task `name` with the run's recall settings for a recall task, with defaults for
    others.

    Unlike in training, enough facts are always left for another question.
    """
    options = _staged_options(name, config, held_out=True)
    if name in RECALL_TASKS:
        options["leave_another"] = True
    return _task(name, config, data, domains, seed=seed, **options)


def evaluated_task(
    name: str,
    config: RunConfig,
    data: RunData,
    domains: Sequence[Domain],
    *,
    seed: int,
    wc_length: int,
    as_trained: bool,
) -> Task:
    """Return task `name` for evaluating working contexts of up to `wc_length` entries.

    Recall tasks use the run's recall settings at the last stage. At the trained lengths
    (`as_trained`: the run's own T, and W at most its own) these settings also give the number of
    facts; at other lengths it is at least `facts_for(wc_length)`. All other tasks have exactly that
    many. There are always enough facts for one question.

    Raises ConfigError if lengths do not fit; if fewer questions would fit, it names the option
    `--questions` of launch/evaluate.py.
    """
    if name not in RECALL_TASKS:
        return _task(name, config, data, domains, seed=seed, wc_length=wc_length)
    options = _recall_options(name, config, held_out=True)
    family, geometry = make_family(name, **options), config.mc.geometry
    _check_questions(name, config, options)
    group, blocks = family.group_size, geometry.head_nodes[1]
    wanted = max(
        config.data.recall.facts_by_stage[-1],
        family.min_facts,
        (
            0
            if as_trained and wc_length <= config.mc.train_wc_length
            else facts_for(family, geometry, wc_length)
        ),
    )
    facts = min(_whole_groups(wanted, group), blocks // group * group)
    planted = min(_whole_groups(config.data.recall.planted or 0, group), blocks // group * group)
    options |= {
        "leave_another": True,
        "facts_by_stage": [facts],
        "planted": planted if planted > facts else None,
    }
    return _task(name, config, data, domains, seed=seed, **options)


def num_stages(config: RunConfig) -> int:
    """Return the number of curriculum stages: that of the recall facts if the mixture has recall
    tasks, else one.
    """
    return len(config.data.recall.facts_by_stage) if RECALL_TASKS & config.data.tasks.keys() else 1


def main_task(config: RunConfig) -> str:
    """Return the name of the task with the largest share, on which validation compares policies."""
    return max(config.data.tasks, key=lambda name: config.data.tasks[name])


def _task(
    name: str,
    config: RunConfig,
    data: RunData,
    domains: Sequence[Domain],
    *,
    seed: int,
    **options: Any,
) -> Task:
    """Return a task over each domain, combined into one."""
    tasks: list[tuple[float, str, Task]] = []
    for domain in domains:
        if name == "corpus":
            task: Task = CorpusTask(_text(config, data, domain, seed=seed))
        elif name in PROMPTS:
            source = TextSource(data.tokenizer, [domain])
            task = AnsweredPrompts(PromptTask(name, PROMPTS[name], source, seed=seed), config.mc)
        else:
            task = make_task(
                name,
                shards=domain.shards,
                tokenizer=data.tokenizer,
                mc=config.mc,
                seed=seed,
                **options,
            )
        tasks.append((domain.weight, domain.name, task))
    return tasks[0][2] if len(tasks) == 1 else DomainsTask(tasks, seed=seed)


def _text(config: RunConfig, data: RunData, domain: Domain, *, seed: int) -> LanguageModelSource:
    """Return a source of the windows of a domain, packed as in the run."""
    mc = config.mc
    return LanguageModelSource(
        domain.shards,
        seq_len=mc.seq_len,
        horizon_tokens=mc.horizon_tokens,
        seed=seed,
        name=domain.name,
        windows=windows_of(
            domain.shards, config.data, seq_len=mc.seq_len, seed=seed, cache=data.cache
        ),
    )


def _recall_options(name: str, config: RunConfig, *, held_out: bool) -> dict[str, Any]:
    """Return the run's settings that are fields of the family of a recall task. Only `recall` and
    `recall_hops2` take `key_tokens`; words are either those for training or those `held_out`.
    """
    settings = config.data.recall.model_dump() | {
        "wordnet": config.data.wordnet,
        "held_out": held_out,
    }
    fields = set(type(FAMILIES[name]).model_fields)
    if name not in ("recall", "recall_hops2"):
        fields -= {"key_tokens"}
    return {field: value for field, value in settings.items() if field in fields}


def _staged_options(name: str, config: RunConfig, *, held_out: bool) -> dict[str, Any]:
    """Return the recall settings with the number of facts at all stages; empty for other tasks."""
    if name not in RECALL_TASKS:
        return {}
    recall, options = config.data.recall, _recall_options(name, config, held_out=held_out)
    group = make_family(name, **options).group_size
    return options | {
        "planted": recall.planted,
        "facts_by_stage": [_whole_groups(facts, group) for facts in recall.facts_by_stage],
    }


def _whole_groups(facts: int, group: int) -> int:
    return -(-facts // group) * group


def _check_questions(name: str, config: RunConfig, options: dict[str, object]) -> None:
    """Raise ConfigError if the questions do not fit but fewer would."""
    mc, questions, asked = config.mc, config.data.recall.questions, make_family(name, **options)
    fewer = (
        make_family(name, **options | {"questions": count, "min_questions": None})
        for count in range(questions, 0, -1)
    )
    fitting = next(
        (questions - less for less, family in enumerate(fewer) if _fits(family, mc)), None
    )
    if fitting is not None and fitting < questions:
        raise ConfigError(
            f"task {name}: {questions} questions need a horizon of {asked.horizon_tokens} tokens, a"
            f" tail of {asked.question_tokens + mc.horizon_tokens} and {asked.min_facts} blocks,"
            f" but there are {mc.horizon_tokens}, {mc.recent_tokens} and"
            f" {mc.geometry.head_nodes[1]}: use --questions {fitting}"
        )


def _fits(family: Family, mc: MCConfig) -> bool:
    return (
        family.horizon_tokens <= mc.horizon_tokens
        and family.question_tokens + mc.horizon_tokens <= mc.recent_tokens
        and family.min_facts <= mc.geometry.head_nodes[1]
    )
