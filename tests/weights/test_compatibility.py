"""What a config must share with the checkpoint that it resumes: all that shapes weights or says
what the weights mean.
"""

import json
from typing import Any

import pytest

from mc_ds.config import ConfigError, CurriculumConfig, DataConfig, MCConfig, RunConfig
from mc_ds.weights.compatibility import changes, require_match, requirements
from tests.support.factories import mc_config, run_config

MUST_AGREE: dict[str, Any] = dict(
    seq_len=192,
    recent_tokens=16,
    horizon_tokens=4,
    block_size=2,
    max_lod=1,
    position_scheme="order",
    gist_dim=64,
    gist_layers=1,
    lens_dim=64,
    lens_layers=3,
    lens_heads=4,
    lens_index=False,
    lens_ask="untied",
    lens_ask_reach="open",
    lens_block_scores="shared",
    lens_matches="words",
    random_blocks=3,
)
"""Settings of MCConfig that shape weights or are part of what they compute, each with another
value than `mc_config` has.
"""
MAY_CHANGE = set(
    """
    train_wc_length wc_schedule wc_period num_random_variants random_variant_iterations
    training_lod2_probability training_lod2_max_share lens_index_white horizon_loss_weight lens_objective lens_split_margins
    lens_temperature max_lens_pairs lens_hard_negative_ratio lens_pair_baseline lens_collapse_weight lens_rank_weight lens_margin
    lens_budget_weight lens_adv_norm_beta lens_start_step lens_lr lens_warmup_steps
    """.split()
)
"""What is trained and how; whether there are variants at all must agree."""


def facts(config: RunConfig) -> dict[str, Any]:
    return requirements(config, device_type="cpu", tokenizer="t", data="d")


def test_every_setting_of_megacontext_either_must_agree_or_may_change() -> None:
    assert set(MCConfig.model_fields) == MUST_AGREE.keys() | MAY_CHANGE
    assert not MUST_AGREE.keys() & MAY_CHANGE


@pytest.mark.parametrize("name", MUST_AGREE)
def test_what_shapes_the_weights_must_agree(name: str) -> None:
    mine = facts(run_config(mc_config()))
    changed = run_config(mc_config().model_copy(update={name: MUST_AGREE[name]}))
    with pytest.raises(
        ConfigError, match=rf"has another config: mc\.{name} = .* there, .* here: use"
    ):
        require_match("step_1", facts(changed), mine)


def test_another_decoder_other_data_and_other_batches_are_named() -> None:
    config = run_config(mc_config())
    changes: dict[str, Any] = {
        "backbone.ffn_dim": config.model_copy(
            update={"backbone": config.backbone.model_copy(update={"ffn_dim": 96})}
        ),
        "seed": config.model_copy(update={"seed": 7}),
    }
    for name, value in dict(frozen="all", global_batch_size=64, precision="bf16").items():
        train = config.train.model_copy(update={name: value})
        changes[f"train.{name}"] = config.model_copy(update={"train": train})
    for name, other in changes.items():
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            require_match("step_1", facts(other), facts(config))
    for name in ("tokenizer", "data"):
        with pytest.raises(ConfigError, match=f"the {name} is another one .hash other there"):
            require_match("step_1", facts(config) | {name: "other"}, facts(config))
    plain = run_config(mc_config(num_random_variants=0))
    with pytest.raises(ConfigError, match=r"mc\.num_random_variants > 0 = False there, True here"):
        require_match("step_1", facts(plain), facts(config))
    require_match("step_1", facts(config), facts(config))


@pytest.mark.parametrize(("switch", "name"), [(False, "none"), (True, "words")])
def test_matches_were_a_switch_in_older_checkpoints(switch: bool, name: str) -> None:
    config = run_config(mc_config(lens_matches=name))
    older = facts(config) | {"mc.lens_matches": switch}
    require_match("step_1", older, facts(config))
    other = facts(run_config(mc_config(lens_matches="meaning")))
    with pytest.raises(ConfigError, match=f"lens_matches = '{name}' there, 'meaning' here"):
        require_match("step_1", older, other)
    stored = config.model_dump(mode="json")
    before = {**stored, "mc": {**stored["mc"], "lens_matches": switch}}
    assert changes(before, stored) == []


def reading(tasks: dict[str, float], **recall: Any) -> RunConfig:
    config = run_config(mc_config())
    data = DataConfig.model_validate({"tasks": tasks, "recall": recall})
    return config.model_copy(update={"data": data})


BOTH = {"recall": 1.0, "corpus": 2.0}
STAGES = dict(facts_by_stage=[4, 6])
PATIENT = CurriculumConfig(interval=60)


@pytest.mark.parametrize(
    ("theirs", "mine", "said"),
    [
        (reading({"corpus": 1.0}), reading(BOTH), ["data.tasks", "order of mixtures"]),
        (reading({"corpus": 2.0, "recall": 1.0}), reading(BOTH), ["data.tasks"]),
        (reading(BOTH), reading(BOTH, questions=2), ["data.recall.questions"]),
        (reading(BOTH, **STAGES), reading(BOTH), ["data.recall.facts_by_stage"]),
        (
            reading(BOTH, **STAGES),
            reading(BOTH, **STAGES).model_copy(update={"curriculum": PATIENT}),
            ["curriculum.interval"],
        ),
        # What nothing reads may be anything.
        (reading({"corpus": 1.0}), reading({"corpus": 1.0}, questions=2), []),
        (reading(BOTH), reading(BOTH).model_copy(update={"curriculum": PATIENT}), []),
    ],
)
def test_what_decides_which_data_comes_next_must_agree(
    theirs: RunConfig, mine: RunConfig, said: list[str]
) -> None:
    """Also the order of tasks, by which samples are shared out among them."""
    stored = json.loads(json.dumps(facts(theirs)))
    if not said:
        return require_match("step_1", stored, facts(mine))
    with pytest.raises(ConfigError) as error:
        require_match("step_1", stored, facts(mine))
    named = [
        part.split(" = ")[0]
        for part in str(error.value).split(" has another config: ")[1].split("; ")
    ]
    assert named == said


def test_a_mixture_drawn_in_an_older_order_is_refused_a_single_part_is_not() -> None:
    for config, refused in ((reading(BOTH), True), (reading({"corpus": 1.0}), False)):
        older = {key: value for key, value in facts(config).items() if key != "order of mixtures"}
        if refused:
            with pytest.raises(ConfigError, match="order of mixtures = None there"):
                require_match("step_1", older, facts(config))
        else:
            require_match("step_1", older, facts(config))


def test_what_may_change_is_said_but_for_what_changes_nothing() -> None:
    config = run_config(mc_config())
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    train = config.train.model_copy(update={"learning_rate": 0.5, "schedule": "wsd"})
    changed = config.model_copy(
        update={"train": train, "name": "other", "out_dir": "elsewhere", "resume": "never"}
    )
    assert changes(stored, changed.model_dump(mode="json")) == [
        "train.learning_rate = 0.001 there, 0.5 here",
        "train.schedule = 'cosine' there, 'wsd' here",
    ]
    assert changes(stored, config.model_dump(mode="json")) == []
