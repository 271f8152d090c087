"""`make_task`: create any task by its name."""

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from mc_ds.config import ConfigError, MCConfig
from mc_ds.config.errors import validation_error
from mc_ds.data.shards import TokenShards
from mc_ds.data.source import LanguageModelSource
from mc_ds.data.tokenizer import Tokenizer
from mc_ds.geometry import Geometry
from mc_ds.tasks.base import Task, errors_of
from mc_ds.tasks.corpus import CorpusTask
from mc_ds.tasks.domains import DomainsTask
from mc_ds.tasks.meaning import ByMeaning
from mc_ds.tasks.neighbours import Neighbours
from mc_ds.tasks.planting import Family, PlantedTask, check_fit
from mc_ds.tasks.recall import Chains
from mc_ds.tasks.ruler import CommonWords, MultiValue
from mc_ds.tasks.vocabulary import NUM_KEYS, TaskVocabulary

FAMILIES: dict[str, Family] = {
    "recall": Chains(),
    "recall_hops2": Chains(hops=2),
    "recall_key3": Chains(key_tokens=3),
    "synonym": ByMeaning(),
    "gloss": ByMeaning(by="gloss", asked_tokens=16),
    "neighbour": Neighbours(),
    "niah_single": Chains(questions=1),
    "niah_multikey": Chains(questions=1),
    "niah_multivalue": MultiValue(),
    "niah_multiquery": Chains(),
    "variable_tracking": Chains(questions=1, hops=3, definition_first=True),
    "common_words": CommonWords(),
}
"""The family of each task that plants facts, with its default options."""
SINGLE_FACT = "niah_single"
"""The task with a single fact and no distractors, whatever the budget: it can be found without
knowing the question.
"""
TASK_NAMES = ("corpus", *FAMILIES)
"""Names of all tasks."""


def make_task(
    name: str,
    *,
    shards: TokenShards,
    tokenizer: Tokenizer,
    mc: MCConfig,
    seed: int,
    facts_by_stage: Sequence[int] | None = None,
    num_keys: int | None = None,
    planted: int | None = None,
    wc_length: int | None = None,
    **options: object,
) -> Task:
    """Return the task `name` over the text of `shards`, at the lengths of `mc`.

    * `facts_by_stage`: number of facts at each stage of a curriculum; default: `facts_for` of
      `wc_length`. `niah_single` always plants one fact.
    * `wc_length`: longest working context that will read the task; default: `mc.train_wc_length`.
    * `num_keys`: number of distinct token ids used in keys; default: 128, or with keys of one token
      at least the number of facts.
    * `planted`: number of places with a fact at every stage, filled by repeating facts; default:
      none is repeated.
    * `options`: fields of the task's family (`FAMILIES`), such as `questions`.

    Raises ConfigError for an unknown name or option, and if T, K, the tail, the horizon, the corpus
    or the vocabulary do not fit.
    """
    if name == "corpus":
        given = [*options, *(["facts_by_stage"] if facts_by_stage is not None else [])]
        if given:
            raise ConfigError(
                f"task corpus: {given[0]} is not an option: plain text has no options"
            )
        return CorpusTask(
            LanguageModelSource(
                shards, seq_len=mc.seq_len, horizon_tokens=mc.horizon_tokens, seed=seed
            )
        )
    if shards.index.tokenizer_sha256 != tokenizer.sha256:
        raise ConfigError(
            f"task {name}: {shards.folder} was made with another tokenizer: use the tokenizer that"
            " was prepared with it"
        )
    family, facts_by_stage, num_keys = _resolved(
        name, mc, facts_by_stage, num_keys, wc_length or mc.train_wc_length, options
    )
    with errors_of(name):
        paraphrases = family.paraphrases(tokenizer)
    vocabulary = TaskVocabulary.of(tokenizer, num_keys, paraphrases)
    return PlantedTask(
        name,
        family,
        shards=shards,
        vocabulary=vocabulary,
        mc=mc,
        facts_by_stage=facts_by_stage,
        seed=seed,
        planted=planted,
    )


def check_task(
    name: str,
    mc: MCConfig,
    *,
    facts_by_stage: Sequence[int] | None = None,
    planted: int | None = None,
    **options: object,
) -> None:
    """Raise ConfigError if `make_task` would, for any text and tokenizer."""
    if name != "corpus":
        family, facts, num_keys = _resolved(
            name, mc, facts_by_stage, None, mc.train_wc_length, options
        )
        check_fit(name, family, mc, facts, planted, alphabet=num_keys)


def _resolved(
    name: str,
    mc: MCConfig,
    facts_by_stage: Sequence[int] | None,
    num_keys: int | None,
    wc_length: int,
    options: Mapping[str, object],
) -> tuple[Family, Sequence[int], int]:
    """Return the family of a task, its number of facts by stage and its number of keys, with
    defaults filled in.
    """
    family = make_family(name, **options)
    with errors_of(name):
        family.require()
    if name == SINGLE_FACT:
        if facts_by_stage is not None:
            raise ConfigError(
                f"task {name}: facts_by_stage = {list(facts_by_stage)} is not possible, since this"
                " task plants one fact: leave it out, or use niah_multikey"
            )
        facts_by_stage = [family.min_facts]
    if facts_by_stage is None:
        facts_by_stage = [facts_for(family, mc.geometry, wc_length)]
    if num_keys is None:
        num_keys = (
            max([NUM_KEYS, *map(family.num_keys, facts_by_stage)])
            if family.key_tokens == 1
            else NUM_KEYS
        )
    return family, facts_by_stage, num_keys


def make_family(name: str, **options: object) -> Family:
    """Return the family of task `name` with `options` changed. Its properties tell which lengths
    the task needs. Raises ConfigError for an unknown name or an invalid option.
    """
    if name not in FAMILIES:
        raise ConfigError(f"task {name!r} is unknown: use {', '.join(TASK_NAMES)}")
    default = FAMILIES[name]
    try:
        return type(default).model_validate({**default.model_dump(), **options})
    except ValidationError as error:
        raise ConfigError(f"task {name}: {validation_error(error, type(default))}") from None


def facts_for(family: Family, geometry: Geometry, wc_length: int) -> int:
    """Return the default number of facts: twice the number of blocks that a working context of
    `wc_length` entries can hold open, at most one per block.
    """
    group, blocks = family.group_size, geometry.head_nodes[1]
    wanted = max(2 * open_blocks(geometry, wc_length), 2 * family.min_facts)
    return min(-(-wanted // group), blocks // group) * group


def too_few_facts(task: Task, geometry: Geometry, wc_length: int) -> str | None:
    """Return a warning if `task` has a fact in every block, and these are fewer than twice the
    blocks that `wc_length` entries can open; else None.
    """
    task = task.tasks[0] if isinstance(task, DomainsTask) else task
    if not isinstance(task, PlantedTask) or task.name == SINGLE_FACT:
        return None
    facts, opened, group = (
        task.facts_by_stage[-1],
        open_blocks(geometry, wc_length),
        task.family.group_size,
    )
    if facts >= 2 * opened or facts < geometry.head_nodes[1] // group * group:
        return None
    return (
        f"task {task.name}: {wc_length} entries can open {opened} of the {geometry.head_nodes[1]}"
        f" blocks of {geometry.seq_len} tokens, which hold {facts} facts, less than twice as many:"
        " the hit rate by chance is high, use a smaller budget"
    )


def open_blocks(geometry: Geometry, wc_length: int) -> int:
    """Return the largest number of head blocks that a full cover of `wc_length` entries can hold at
    LOD0, with all others as coarse as possible.
    """
    units, collapsed = geometry.units(wc_length), 0
    for level in range(geometry.max_lod, 0, -1):
        removed = (geometry.block_size**level - 1) // (geometry.block_size - 1)
        nodes, units = divmod(units, removed)
        collapsed += nodes * geometry.block_size ** (level - 1)
    return geometry.head_nodes[1] - collapsed
