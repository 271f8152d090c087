"""The config of a model that reads histories of another length."""

from mc_ds.config.run import RunConfig


def with_history(config: RunConfig, seq_len: int) -> RunConfig:
    """Return `config` with histories of `seq_len` tokens. W becomes the largest reachable length
    that is not above the same share of T.

    Recall tasks keep the density of facts of the run's last stage. At its own length `config`
    itself is returned. Raises ValueError where no working context has that share.
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
