"""The measured curriculum: deterministic stages, delayed beyond any prefetch, and a LensNet that waits for the last one."""

import pytest

from mc_ds.config import ConfigError, CurriculumConfig
from mc_ds.training.curriculum import Curriculum
from mc_ds.training.lens_monitor import WINDOW, LensMonitor


def curriculum(stages: int = 3) -> Curriculum:
    return Curriculum(CurriculumConfig(spread=0.4, interval=10, start_step=20, delay_steps=5), num_stages=stages)


def test_a_wide_spread_raises_the_stage_after_the_delay() -> None:
    c = curriculum()
    for steps_done in range(1, 61):
        c.observe(steps_done, 0.5 if steps_done >= 25 else 0.3, 3.0)
    assert [c.stage_at(step) for step in (0, 34, 35, 44, 45, 1000)] == [0, 0, 1, 1, 2, 2]
    assert c.end_step() == 45
    assert not c.wants(60)


def test_a_low_loss_raises_the_stage_where_every_variant_can_answer() -> None:
    c = Curriculum(CurriculumConfig(spread=0.4, horizon_loss=2.5, interval=10, start_step=20, delay_steps=5), num_stages=2)
    c.observe(20, 0.1, 2.6)
    assert c.end_step() is None
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
    slow = Curriculum(CurriculumConfig(spread=0.4, interval=10, start_step=20, delay_steps=15), num_stages=3)
    slow.observe(20, 9.0, 3.0)
    slow.observe(30, 9.0, 3.0)  # the change to stage 1 takes effect at 35
    assert slow.stage_at(100) == 1
    assert slow.end_step() is None
    slow.observe(40, 9.0, 3.0)
    assert slow.end_step() == 55


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
    curriculum().check_prefetch(4)
    curriculum(1).check_prefetch(50)
    with pytest.raises(ConfigError, match="use at least 6"):
        curriculum().check_prefetch(5)


def record(corr: float, control: float = 0.0, spread: float = 0.3) -> dict[str, float]:
    return {"mc/preference_corr_mean": corr, "mc/preference_corr_lod_only": control, "mc/adv_delta_std": spread}


def test_the_monitor_warns_once_and_names_the_likely_cause() -> None:
    monitor = LensMonitor(200)
    said = [monitor.observe(record(-0.3, -0.3)) for _ in range(400)]
    assert [step for step, text in enumerate(said, 1) if text] == [200]
    assert "lens_lr" in str(said[199])
    flat = LensMonitor(WINDOW)
    said = [flat.observe(record(0.0, spread=0.001)) for _ in range(WINDOW)]
    assert "hardly differ" in str(said[-1])


def test_the_monitor_is_silent_where_lensnet_learns_or_does_not_run() -> None:
    learning = LensMonitor(200)
    assert not any(learning.observe(record(-0.1 if step > 60 else 0.0)) for step in range(400))
    for quiet in (LensMonitor(200), LensMonitor(0)):
        assert not any(quiet.observe({"train/loss": 1.0}) for _ in range(300))
    assert not any(LensMonitor(0).observe(record(0.0)) for _ in range(600))
