"""The warning for a LensNet that does not learn: when it is due, what it says, and that it
survives a restart.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mc_ds.training.guards.exit_codes import ExitCode
from mc_ds.training.lens_monitor import WINDOW, LensMonitor
from tests.support.fault_ranks import start, tiny
from tests.support.tiny_run import write_library

Record = dict[str, float]
RESTING: Record = {"train/loss": 1.0, "mc/wc_length": 64.0, "mc/lensnet_calls": 8.0}
"""Of an uncompressed step, or before LensNet's start."""


def record(
    corr: float | None, control: float | None = 0.0, spread: float = 0.3, scores: float = 0.2
) -> Record:
    """Of a step in which LensNet ran; a correlation that is None is undefined, so that its key
    is absent.
    """
    correlations = {"mc/preference_corr_mean": corr, "mc/preference_corr_lod_only": control}
    present = {key: value for key, value in correlations.items() if value is not None}
    return {**RESTING, **present, "mc/horizon_spread": spread, "mc/policy_score_std_mean": scores}


def warnings(monitor: LensMonitor, said: list[Record]) -> dict[int, str]:
    """What is said after which of the records, counted from 1."""
    return {
        number: text
        for number, one in enumerate(said, 1)
        if (text := monitor.observe(one)) is not None
    }


def test_it_warns_once_and_only_when_its_patience_is_over() -> None:
    for patience in (1, 30, WINDOW, 250):
        (step,) = warnings(LensMonitor(patience), [record(-0.3, -0.3)] * 600)
        assert step == patience
    assert not warnings(LensMonitor(0), [record(0.0)] * 600)


def test_steps_in_which_lensnet_rests_do_not_count() -> None:
    (step,) = warnings(LensMonitor(50), [RESTING, record(0.0), RESTING] * 100)
    assert step == 3 * 49 + 2
    assert not warnings(LensMonitor(50), [RESTING] * 300)


@pytest.mark.parametrize(
    ("difference", "warns"), [(-0.015, True), (-0.025, False), (-0.08, False), (0.5, True)]
)
def test_a_correlation_must_be_a_margin_below_its_control(difference: float, warns: bool) -> None:
    for control in (0.0, -0.4, 0.3):
        assert (
            bool(warnings(LensMonitor(200), [record(control + difference, control)] * 200)) is warns
        )


@pytest.mark.parametrize(
    ("mean", "deviation", "warns"),
    [(-0.05, 0.2, True), (-0.07, 0.2, False), (-0.07, 0.3, True), (-0.05, 0.1, False)],
)
def test_a_difference_must_exceed_three_of_its_standard_errors(
    mean: float, deviation: float, warns: bool
) -> None:
    """Of 100 steps: a tenth of the deviation."""
    said = [record(mean + deviation * (-1) ** step) for step in range(150)]
    assert bool(warnings(LensMonitor(150), said)) is warns


def test_a_lucky_stretch_does_not_silence_it() -> None:
    lucky = [record(-0.3)] * 150 + [record(0.0)] * 350
    assert list(warnings(LensMonitor(500), lucky)) == [500]
    late = [record(0.0)] * 400 + [record(-0.3)] * 100
    assert not warnings(LensMonitor(500), late + [record(0.0)] * 1000), (
        "judged once, on the last steps of its patience"
    )


def test_a_lensnet_without_any_correlation_is_warned_of() -> None:
    dead = [record(None, None, scores=0.0)] * 200
    assert "are all equal (mc/policy_score_std_mean = 0)" in warnings(LensMonitor(200), dead)[200]
    some = [record(-0.1)] * 20 + [record(None, None)] * 80
    assert list(warnings(LensMonitor(100), some)) == [100], "each counts as 0: -0.02 on average"
    not_numbers = [record(math.nan, math.nan, scores=math.nan)] * 100
    assert list(warnings(LensMonitor(100), not_numbers)) == [100]


@pytest.mark.parametrize(
    ("spread", "scores", "cause"),
    [
        (0.019, 0.2, "the losses of the variants hardly differ (mc/horizon_spread = 0.019 nats)"),
        (0.019, 0.0, "the losses of the variants hardly differ"),
        (0.021, 0.2, "scores do not predict them: lower mc.lens_lr"),
        (0.021, 2e-4, "scores do not predict them"),
        (
            0.021,
            5e-5,
            "LensNet's scores are all equal (mc/policy_score_std_mean = 5e-05): if",
        ),
    ],
)
def test_it_names_the_likely_cause_from_all_the_steps_it_judges(
    spread: float, scores: float, cause: str
) -> None:
    said = [record(0.0, spread=spread + noise, scores=scores) for noise in (0.015, -0.015) * 50]
    assert cause in warnings(LensMonitor(100), said)[100]


def test_its_state_goes_through_json_and_goes_on_where_it_was() -> None:
    said = [
        record(0.01 * math.sin(step), spread=0.02 + 0.001 * math.cos(step)) for step in range(160)
    ]
    straight = warnings(LensMonitor(150), said)
    for cut in (1, 60, 149, 150):
        before, after = LensMonitor(150), LensMonitor(150)
        first = warnings(before, said[:cut])
        state = json.loads(json.dumps(before.state_dict(), allow_nan=False))
        after.load_state_dict(state)
        assert (
            first | {cut + step: text for step, text in warnings(after, said[cut:]).items()}
            == straight
        )


# In a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose LensNet moves by nothing, asked to stop in its fourth step."""
    folder = tmp_path_factory.mktemp("monitor")
    write_library(folder / "library")
    ranks = start(folder, 1, recipe(folder, "dead"), faults={0: ["raise_signal", 3, 15]})
    assert ranks.wait() == [ExitCode.REQUEUE]
    assert "warning" not in ranks.text()
    return folder


def recipe(folder: Path, name: str) -> dict[str, Any]:
    patient = dict(eval_interval=0, lens_patience=5)
    return tiny(
        folder,
        name,
        mc=dict(num_random_variants=2, lens_lr=1e-12, lens_warmup_steps=20),
        validation=patient,
    )


def test_a_run_that_was_interrupted_warns_after_as_many_steps(folder: Path) -> None:
    """Patience for 5 steps, of which 4 were made before the interruption and 2 after it."""
    ranks = start(folder, 1, recipe(folder, "dead"))
    ranks.finish()
    assert "resumes after step 4" in ranks.text()
    assert ranks.text().count("warning: after 5 steps of LensNet") == 1
