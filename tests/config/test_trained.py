"""The same model reading histories of another length."""

import pytest

from mc_ds.config.trained import with_history
from tests.support.factories import mc_config, run_config


def test_share_of_the_history_and_density_of_facts_are_kept() -> None:
    config = run_config(
        mc_config(wc_schedule=[{"start_step": 0, "train_wc_length": 48}], wc_period=7)
    )
    config = config.model_copy(
        update={
            "data": config.data.model_copy(
                update={"recall": config.data.recall.model_copy(update={"facts_by_stage": [4, 10]})}
            )
        }
    )
    longer = with_history(config, 192)
    assert (
        longer.mc.seq_len,
        longer.mc.train_wc_length,
        longer.mc.wc_schedule,
        longer.mc.wc_period,
    ) == (192, 96, [], None)
    assert config.mc.geometry.head_nodes[1] == 21
    assert longer.mc.geometry.head_nodes[1] == 45
    assert longer.data.recall.facts_by_stage == [21], "10 facts in 21 blocks, 45 blocks now"
    assert longer.data.recall.planted is None
    assert with_history(config, 48).data.recall.facts_by_stage == [4], (
        "at least as many as are asked"
    )


def test_a_history_too_short_for_its_share_is_refused() -> None:
    config = run_config(mc_config(train_wc_length=24))
    with pytest.raises(ValueError, match="cannot cover 40 tokens"):
        with_history(config, 40)
