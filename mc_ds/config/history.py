"""Derives a model's config for sequences of another length."""

from mc_ds.config.run import RunConfig


def with_history(config: RunConfig, seq_len: int) -> RunConfig:
    """Return `config` for sequences of `seq_len` tokens; `config` itself if that is its length.

    The ratio W / T is kept, rounded down to a reachable W. Recall tasks keep the facts per block of
    the run's last stage. Raises ValueError if no reachable W is small enough.
    """
    if seq_len == config.mc.seq_len:
        return config
    mc = config.mc.model_dump()
    share = config.mc.train_wc_length / config.mc.seq_len
    geometry = config.mc.geometry.with_length(seq_len)
    mc |= {
        "seq_len": seq_len,
        "train_wc_length": geometry.reachable_at_most(share * seq_len),
        "wc_schedule": [],
        "wc_period": None,
    }
    recall = config.data.recall
    facts = max(
        recall.questions,
        round(
            recall.facts_by_stage[-1] * geometry.head_nodes[1] / config.mc.geometry.head_nodes[1]
        ),
    )
    data = config.data.model_dump() | {
        "recall": recall.model_dump() | {"facts_by_stage": [facts], "planted": None}
    }
    return RunConfig.model_validate({**config.model_dump(), "mc": mc, "data": data})
