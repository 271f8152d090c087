"""Training sequences of a run: its mixture of tasks over one split of the corpus."""

from mc_ds.config import RunConfig
from mc_ds.config.run import RECALL_TASKS
from mc_ds.data import LanguageModelSource, PreparedCorpus, SampleSource, TokenShards
from mc_ds.evaluation.tasks import MixedSource, Task, TaskSource, make_family, make_task


def make_source(config: RunConfig, corpus: PreparedCorpus, shards: TokenShards) -> SampleSource:
    """The run's mixture over `shards`. Raises ConfigError for an unknown task or lengths that do not fit it."""
    mc, seed = config.mc, config.seed
    parts: list[tuple[float, SampleSource]] = []
    for name, share in config.data.tasks.items():
        if name == "corpus":
            parts.append((share, LanguageModelSource(shards, seq_len=mc.seq_len, horizon_tokens=mc.horizon_tokens, seed=seed)))
        else:
            parts.append((share, TaskSource(run_task(name, config, corpus, shards, seed=seed))))
    return parts[0][1] if len(parts) == 1 else MixedSource(parts, seed=seed)


def run_task(name: str, config: RunConfig, corpus: PreparedCorpus, shards: TokenShards, *, seed: int) -> Task:
    """Task `name` with the options that the run gives it: its recall settings for the recall tasks, defaults for the others."""
    options: dict[str, object] = {}
    if name in RECALL_TASKS:
        options = config.data.recall.model_dump(exclude={"key_tokens"} if name == "recall_key3" else None)
        group = make_family(name).group_size
        options["facts_by_stage"] = [-(-facts // group) * group for facts in config.data.recall.facts_by_stage]
    return make_task(name, shards=shards, tokenizer=corpus.tokenizer, mc=config.mc, seed=seed, **options)  # type: ignore[arg-type]


def num_stages(config: RunConfig) -> int:
    """Stages of the data: those of the recall facts where the mixture has any, else one."""
    return len(config.data.recall.facts_by_stage) if RECALL_TASKS & config.data.tasks.keys() else 1


def main_task(config: RunConfig) -> str:
    """The task with the largest share, which validation compares policies on."""
    return max(config.data.tasks, key=lambda name: config.data.tasks[name])
