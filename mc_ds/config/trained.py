"""Derives configs from that of a trained model: for sequences of another length, or with other
settings of inference.
"""

from collections.abc import Mapping

from pydantic import TypeAdapter, ValidationError

from mc_ds.config.errors import ConfigError, field_paths, unknown_key, validation_error
from mc_ds.config.run import RunConfig
from mc_ds.config.types import Tokens

INFERENCE_SETTINGS = (
    "mc.recent_tokens",
    "mc.horizon_tokens",
    *(path for path in field_paths(RunConfig) if path.startswith(("focus.", "retrieval."))),
)
"""Settings that may differ from those of the training, by dotted name: no weight's shape depends on
them. They are the protected tail, the room for new tokens at its end, and how contexts are chosen.
"""


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


def with_inference_settings(config: RunConfig, given: Mapping[str, str]) -> RunConfig:
    """Return `config` with the values `given`, as written on a command line (null: None), for some
    of `INFERENCE_SETTINGS`. A tail can only become shorter, since every block that it loses is one
    more to choose, and blocks that it gains were never in one.

    Raises ConfigError for another setting and for a bad value.
    """
    sections = config.model_dump()
    for key, value in given.items():
        if key not in field_paths(RunConfig):
            raise unknown_key(key, INFERENCE_SETTINGS)
        if key not in INFERENCE_SETTINGS:
            raise ConfigError(
                f"{key} = {value} cannot be changed after training: use"
                f" {', '.join(INFERENCE_SETTINGS)}"
            )
        section, _, name = key.partition(".")
        sections[section][name] = None if value == "null" else value
    _check_tail(config, sections["mc"]["recent_tokens"])
    try:
        return RunConfig.model_validate(sections)
    except ValidationError as error:
        raise validation_error(error, RunConfig) from error


def _check_tail(config: RunConfig, given: object) -> None:
    """Raise ConfigError for a longer tail, before other settings are found not to fit it."""
    try:
        tail = TypeAdapter(Tokens).validate_python(given)
    except ValidationError:
        return  # reported with all others
    if tail > config.mc.recent_tokens:
        raise ConfigError(
            f"mc.recent_tokens = {tail} is a longer tail than in training: use at most"
            f" {config.mc.recent_tokens}"
        )
