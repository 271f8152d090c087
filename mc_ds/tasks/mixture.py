"""Tasks of a run over one split of the corpus: its mixture in training, and those that
validation and evaluation read.
"""

from typing import Any

from mc_ds.config import ConfigError, MCConfig, RunConfig
from mc_ds.config.run import RECALL_TASKS
from mc_ds.data import LanguageModelSource, PreparedCorpus, SampleSource, TokenShards
from mc_ds.tasks import (
    Family,
    MixedSource,
    Task,
    TaskSource,
    facts_for,
    make_family,
    make_task,
)


def make_source(config: RunConfig, corpus: PreparedCorpus, shards: TokenShards) -> SampleSource:
    """Build the run's mixture of tasks over `shards`. Raises ConfigError for an unknown task or
    lengths that do not fit it.
    """
    mc, seed = config.mc, config.seed
    parts: list[tuple[float, SampleSource]] = []
    for name, share in config.data.tasks.items():
        if name == "corpus":
            parts.append(
                (
                    share,
                    LanguageModelSource(
                        shards, seq_len=mc.seq_len, horizon_tokens=mc.horizon_tokens, seed=seed
                    ),
                )
            )
        else:
            options = _staged_options(name, config)
            parts.append(
                (share, TaskSource(_task(name, config, corpus, shards, seed=seed, **options)))
            )
    return parts[0][1] if len(parts) == 1 else MixedSource(parts, seed=seed)


def run_task(
    name: str, config: RunConfig, corpus: PreparedCorpus, shards: TokenShards, *, seed: int
) -> Task:
    """Build task `name` with the run's own settings: its recall settings for the recall tasks,
    defaults for the others.

    Unlike training data it never asks for so many facts that none are left for another question.
    """
    options = _staged_options(name, config)
    if name in RECALL_TASKS:
        options["leave_another"] = True
    return _task(name, config, corpus, shards, seed=seed, **options)


def evaluated_task(
    name: str,
    config: RunConfig,
    corpus: PreparedCorpus,
    shards: TokenShards,
    *,
    seed: int,
    wc_length: int,
    as_trained: bool,
) -> Task:
    """Build task `name` for evaluating working contexts of up to `wc_length` entries.

    Recall tasks use the run's recall settings at the last stage. At the trained lengths
    (`as_trained`: the run's own T, and W at most its own) these also decide the number of facts; at
    other lengths there are at least as many as `facts_for` gives for `wc_length`, which alone
    decides in all other tasks. There are always enough for one question.

    Raises ConfigError where lengths do not fit; where fewer questions would fit, it names the
    option `--questions` of launch/evaluate.py.
    """
    if name not in RECALL_TASKS:
        return _task(name, config, corpus, shards, seed=seed, wc_length=wc_length)
    options = _recall_options(name, config)
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
    return _task(name, config, corpus, shards, seed=seed, **options)


def num_stages(config: RunConfig) -> int:
    """Return the number of curriculum stages: those of the recall facts where the mixture has
    any, else one.
    """
    return len(config.data.recall.facts_by_stage) if RECALL_TASKS & config.data.tasks.keys() else 1


def main_task(config: RunConfig) -> str:
    """Return the task with the largest share. Validation compares policies on it."""
    return max(config.data.tasks, key=lambda name: config.data.tasks[name])


def _task(
    name: str,
    config: RunConfig,
    corpus: PreparedCorpus,
    shards: TokenShards,
    *,
    seed: int,
    **options: Any,
) -> Task:
    return make_task(
        name, shards=shards, tokenizer=corpus.tokenizer, mc=config.mc, seed=seed, **options
    )


def _recall_options(name: str, config: RunConfig) -> dict[str, Any]:
    """Return the run's recall settings that are fields of the task's family; `recall_key3` has its
    own `key_tokens`.
    """
    kept = {"facts_by_stage", "planted", *(["key_tokens"] if name == "recall_key3" else [])}
    return config.data.recall.model_dump(exclude=kept)


def _staged_options(name: str, config: RunConfig) -> dict[str, object]:
    """Return the recall settings with the facts of all stages; none for other tasks."""
    if name not in RECALL_TASKS:
        return {}
    recall, options = config.data.recall, _recall_options(name, config)
    group = make_family(name, **options).group_size
    return options | {
        "planted": recall.planted,
        "facts_by_stage": [_whole_groups(facts, group) for facts in recall.facts_by_stage],
    }


def _whole_groups(facts: int, group: int) -> int:
    return -(-facts // group) * group


def _check_questions(name: str, config: RunConfig, options: dict[str, object]) -> None:
    """Raise ConfigError where the questions do not fit but fewer would."""
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
            f" tail of {asked.question_tokens + mc.horizon_tokens} and {asked.min_facts} blocks;"
            f" there are {mc.horizon_tokens}, {mc.recent_tokens} and {mc.geometry.head_nodes[1]}:"
            f" use --questions {fitting}"
        )


def _fits(family: Family, mc: MCConfig) -> bool:
    return (
        family.horizon_tokens <= mc.horizon_tokens
        and family.question_tokens + mc.horizon_tokens <= mc.recent_tokens
        and family.min_facts <= mc.geometry.head_nodes[1]
    )
