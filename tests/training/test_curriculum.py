"""The measured curriculum: deterministic stages, delayed beyond any prefetch."""

import pytest

from mc_ds.config import ConfigError, CurriculumConfig
from mc_ds.training.curriculum import Curriculum


def curriculum(stages: int = 3) -> Curriculum:
    return Curriculum(
        CurriculumConfig(spread=0.4, interval=10, start_step=20, delay_steps=5), num_stages=stages
    )


def test_a_wide_spread_raises_the_stage_after_the_delay() -> None:
    c = curriculum()
    for steps_done in range(1, 61):
        c.observe(steps_done, 0.5 if steps_done >= 25 else 0.3, 3.0)
    assert [c.stage_at(step) for step in (0, 34, 35, 44, 45, 1000)] == [0, 0, 1, 1, 2, 2]
    assert c.end_step() == 45
    assert not c.wants(60)


def test_a_low_loss_raises_the_stage_where_every_variant_can_answer() -> None:
    c = Curriculum(
        CurriculumConfig(spread=0.4, horizon_loss=2.5, interval=10, start_step=20, delay_steps=5),
        num_stages=2,
    )
    c.observe(20, 0.4, 2.5)
    assert c.end_step() is None, "either must be passed, not met"
    c.observe(30, 0.1, 2.4)
    assert c.end_step() == 35
    alone = curriculum()
    alone.observe(20, 0.1, 0.0)
    assert alone.stage_at(100) == 0, "without a threshold the spread alone decides"


def test_nothing_rises_before_its_time_or_while_a_change_is_pending() -> None:
    c = curriculum()
    c.observe(10, 9.0, 3.0)  # before start_step
    c.observe(25, 9.0, 3.0)  # between looks
    assert c.stage_at(100) == 0
    slow = Curriculum(
        CurriculumConfig(spread=0.4, interval=10, start_step=20, delay_steps=15), num_stages=3
    )
    slow.observe(20, 9.0, 3.0)
    slow.observe(30, 9.0, 3.0)  # the change to stage 1 takes effect at 35
    assert slow.stage_at(100) == 1
    assert slow.end_step() is None
    slow.observe(40, 9.0, 3.0)
    assert slow.end_step() == 55


def test_a_look_at_the_last_step_of_a_stage_does_not_raise_the_next() -> None:
    """After 32 steps the second stage begins, and the last step that there is to look at was of
    the first one.
    """
    c = Curriculum(
        CurriculumConfig(spread=0.4, interval=16, start_step=16, delay_steps=16), num_stages=3
    )
    spread_of_stage = {0: 0.5, 1: 0.3, 2: 0.3}
    for steps_done in range(1, 129):
        c.observe(steps_done, spread_of_stage[c.stage_at(steps_done - 1)], 3.0)
    assert c.state_dict() == {"changes": [[0, 0], [32, 1]]}
    assert [c.wants(steps_done) for steps_done in (16, 32, 33, 48)] == [
        False,
        False,
        False,
        True,
    ], "a look is not a read in vain"


def test_stages_rise_at_every_second_look_where_the_delay_is_the_interval() -> None:
    c = Curriculum(
        CurriculumConfig(spread=0.4, interval=16, start_step=16, delay_steps=16), num_stages=3
    )
    for steps_done in range(1, 129):
        c.observe(steps_done, 0.5, 3.0)
    assert c.state_dict() == {"changes": [[0, 0], [32, 1], [64, 2]]}


def test_one_stage_has_ended_from_the_start() -> None:
    assert curriculum(1).end_step() == 0
    assert not curriculum(1).wants(20)


def test_state_includes_the_pending_change() -> None:
    c = curriculum()
    c.observe(20, 1.0, 3.0)
    again = curriculum()
    again.load_state_dict(c.state_dict())
    assert [again.stage_at(step) for step in (24, 25)] == [0, 1]
    again.observe(30, 1.0, 3.0)
    c.observe(30, 1.0, 3.0)
    assert again.state_dict() == c.state_dict()


def test_a_delay_within_the_prefetch_is_refused() -> None:
    curriculum(2).check_prefetch(4)
    curriculum(1).check_prefetch(50)
    with pytest.raises(ConfigError, match="use at least 6"):
        curriculum(2).check_prefetch(5)
