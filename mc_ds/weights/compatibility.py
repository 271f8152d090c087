"""The settings that decide whether weights and a config belong together: one list for resuming,
`train.init_from` and bundles.

* Resuming needs every fact in the list to be equal. `train.init_from` itself is not in it: a
  resuming run takes its weights from the checkpoint.
* `train.init_from` compares shapes, then the facts of kind "use", which shapes do not reveal. If
  they differ, a backbone raises an error, a GistNet or LensNet is initialised anew. Differences
  of kind "habit" are reported.
* A bundle's hashes include the settings that determine the gists and index vectors of a tree.

Everything else may change when a run resumes: learning rates, schedule, number of steps, losses,
reporting, ranks, micro-batch, ZeRO stage.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.compare import differing, flatten
from mc_ds.config.data import RECALL_TASKS
from mc_ds.config.mc import MATCHES_BEFORE


class Fact(NamedTuple):
    """A setting, or a section of settings, by its dotted name."""

    name: str
    shows: Literal["shapes", "use", "habit", "run"]
    """What a difference affects. "shapes": the shapes of weights. "use": what weights of equal
    shapes compute, so that trained weights become useless. "habit": the conditions of training, so
    that trained weights work worse but can adapt. "run": only the course of a run.
    """
    tree: tuple[Literal["gists", "index"], ...] = ()
    """Parts of a tree that depend on it."""

    @property
    def part(self) -> str:
        """The part of the model that the setting belongs to."""
        section, _, field = self.name.partition(".")
        if section == "backbone":
            return section
        return {"gist": "gistnet", "lens": "lensnet"}.get(field.partition("_")[0], "model")


FACTS = (
    Fact("backbone.dim", "shapes"),
    Fact("backbone.num_layers", "shapes"),
    Fact("backbone.num_heads", "use"),
    Fact("backbone.num_kv_heads", "use"),
    Fact("backbone.ffn_dim", "shapes"),
    Fact("backbone.rope_base", "use"),
    Fact("backbone.norm_eps", "use"),
    Fact("backbone.tie_embeddings", "shapes"),
    Fact("mc.block_size", "habit", ("gists", "index")),
    Fact("mc.max_lod", "shapes", ("gists", "index")),
    Fact("mc.position_scheme", "habit"),
    Fact("mc.gist_dim", "shapes", ("gists",)),
    Fact("mc.gist_layers", "shapes", ("gists",)),
    Fact("mc.lens_dim", "shapes", ("index",)),
    Fact("mc.lens_layers", "shapes"),
    Fact("mc.lens_heads", "use"),
    Fact("mc.lens_index", "shapes", ("index",)),
    Fact("mc.lens_ask", "shapes"),
    Fact("mc.lens_ask_reach", "use"),
    Fact("mc.lens_matches", "shapes"),
    Fact("mc.lens_block_scores", "habit"),
    Fact("mc.random_blocks", "habit"),
    Fact("mc.seq_len", "run"),
    Fact("mc.recent_tokens", "run"),
    Fact("mc.horizon_tokens", "run"),
    Fact("data.tasks", "run"),
    Fact("data.recall", "run"),
    Fact("curriculum", "run"),
    Fact("train.frozen", "run"),
    Fact("train.global_batch_size", "run"),
    Fact("seed", "run"),
)
"""All facts, in the order in which differences are reported."""
MIXTURE_ORDER = "each part counts its own samples"
"""How mixtures order their samples. Checkpoints of older versions, with another order, lack it."""
HASHED = ("tokenizer", "data")
"""Facts that are known by their hashes."""
UNREPORTED = {
    *("name", "out_dir", "resume", "dry_run", "debug", "mc_log_lod_ascii", "mc_log_lens_debug"),
    "profile",
    *("data.root", "data.cache_dir", "data.tokenizer", "data.num_workers", "train.init_from"),
    *("data.datasets", "data.verify", "data.inline_limit_mb"),
    *("telemetry.wandb", "telemetry.wandb_project", "telemetry.wandb_group"),
    *("telemetry.progress", "telemetry.tensorboard"),
}
"""Settings whose changes are not reported: they do not affect what a run learns, or a fact compares
their effect.
"""


def requirements(
    config: RunConfig, *, device_type: str, tokenizer: str, data: str
) -> dict[str, Any]:
    """Return the facts that a resuming run must share with its checkpoint, by name.

    `tokenizer` and `data` are the hashes of those in use.
    """
    return {
        **{fact.name: value_of(fact, config) for fact in FACTS},
        "mc.num_random_variants > 0": config.mc.num_random_variants > 0,
        "train.precision": config.train.precision_on(device_type),
        "tokenizer": tokenizer,
        "data": data,
        **({"order of mixtures": MIXTURE_ORDER} if len(config.data.tasks) > 1 else {}),
        **_packing(config),
    }


def _packing(config: RunConfig) -> dict[str, Any]:
    """Return the settings that cut documents into sequences, if they are not the oldest ones and a
    task of the mixture uses them; else nothing.
    """
    if config.data.packing == "stream" or "corpus" not in config.data.tasks:
        return {}
    fields = ("packing", "min_document_tokens")
    return {f"data.{field}": getattr(config.data, field) for field in fields}


def require_match(checkpoint: object, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise ConfigError if facts differ, naming each with the values of the checkpoint and of this
    run.
    """
    lines: list[str] = []
    theirs = _renamed(theirs)
    for key in differing(theirs, mine):
        there, here = ({key: facts.get(key)} for facts in (theirs, mine))
        sections = [isinstance(facts[key], Mapping) for facts in (there, here)]
        if all(sections):
            there, here = flatten(there), flatten(here)
        elif any(sections):
            continue  # one side has no such section: another fact names the reason
        lines += [
            f"the {name} is another one ({_begin(there[name])} there, {_begin(here[name])} here)"
            if name in HASHED
            else f"{name} = {there.get(name)!r} there, {here.get(name)!r} here"
            for name in differing(there, here)
        ]
    if lines:
        raise ConfigError(
            f"{checkpoint} has another config: {'; '.join(lines)}: use the same, or another run"
            " name, or resume = never"
        )


def _renamed(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings or facts of a checkpoint with the present names of their values."""
    name = "mc.lens_matches"
    value = settings.get(name)
    return (
        {**settings, name: MATCHES_BEFORE[str(value).lower()]}
        if isinstance(value, bool)
        else settings
    )


def _begin(hash_of_facts: object) -> str:
    """Return how a hash is called in messages."""
    return f"hash {str(hash_of_facts)[:8]}"


def changes(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that a resuming run has changed, with both values. The configs
    are given as JSON.
    """
    there, here = _renamed(flatten(theirs)), flatten(mine)
    return [
        f"{key} = {there.get(key)!r} there, {here.get(key)!r} here"
        for key in differing(there, here)
        if key not in UNREPORTED
    ]


def differences(
    there: RunConfig, here: RunConfig, *, shows: str, part: str | None = None
) -> list[str]:
    """Return a line for each fact of one kind, and optionally of one part, that differs between two
    configs, with both values.
    """
    facts = [fact for fact in FACTS if fact.shows == shows and part in (None, fact.part)]
    values = [(fact.name, value_of(fact, there), value_of(fact, here)) for fact in facts]
    return [
        f"{name} = {theirs!r} there, {ours!r} here"
        for name, theirs, ours in values
        if theirs != ours
    ]


def value_of(fact: Fact, config: RunConfig) -> Any:
    """Return the fact's value in a config, in its JSON form, with defaults that depend on other
    settings resolved; None for a section that this config does not use.
    """
    if fact.name == "mc.gist_dim":
        return config.gist_width
    if fact.name == "data.tasks":  # as a list: the order matters
        return [[name, share] for name, share in config.data.tasks.items()]
    plants = RECALL_TASKS & config.data.tasks.keys()
    staged = plants and len(config.data.recall.facts_by_stage) > 1
    if (fact.name == "data.recall" and not plants) or (fact.name == "curriculum" and not staged):
        return None  # not used
    value: Any = config.model_dump(mode="json")
    for key in fact.name.split("."):
        value = value[key]
    return value


def tree_settings(config: RunConfig, tree: Literal["gists", "index"]) -> dict[str, Any]:
    """Return the settings on which a tree's gists or index vectors depend, besides the weights."""
    names = {fact.name.removeprefix("mc.") for fact in FACTS if tree in fact.tree}
    return config.mc.model_dump(mode="json", include=names)
