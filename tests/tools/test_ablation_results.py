"""Results of ablations and the page that is made of them: what replaces what, and what is written."""

import re
from pathlib import Path

import pytest
from ablation.jobs import State
from ablation.page import BEGIN, END, section, write_section
from ablation.results import (
    EvaluationResult,
    GroupEntry,
    Provenance,
    Results,
    RowEntry,
    TrialResult,
)

from mc_ds.config import ConfigError
from tests.support.tiny_run import ROOT

COMMITTED = ROOT / "launch" / "ablations.yaml"
PAGE, KEPT = ROOT / "docs" / "experiments.md", ROOT / "docs" / "ablations.json"
MADE = Provenance(
    command="python tools/ablate.py",
    date="2026-01-02",
    hardware="2 CPU cores",
    versions="torch 2",
    commit="abc",
    jobs=2,
)


def trial(seed: int, corr: float, hits: float, state: State = State.FINISHED) -> TrialResult:
    records = [
        dict(task="recall", policy="lens", horizon_loss=0.25 * seed, hit_rate=hits, n=8),
        dict(task="recall", policy="random", horizon_loss=2.0, hit_rate=None, n=8),
    ]
    evaluation = EvaluationResult(
        state=State.FINISHED, seconds=3, command="python launch/evaluate.py", records=records
    )
    return TrialResult(
        name=f"t{seed}",
        state=state,
        reason="exit 1: error: a | b" if state is State.FAILED else "",
        seconds=20 + 10 * seed,
        command="python launch/train.py",
        recipe="r.yaml",
        init_from="w",
        seed=seed,
        steps=10,
        sequences=1200,
        parameters=2_345_678,
        metrics=dict(lens_loss=0.5, corr=corr, control=0.001, agreement=0.75),
        made=MADE,
        evaluations={"e": evaluation},
    )


def two_groups() -> Results:
    rows = [
        RowEntry(label="both seeds", trials={0: "a", 1: "b"}, evaluation="e"),
        RowEntry(label="one | seed", trials={0: "a", 1: "gone"}, evaluation="e"),
        RowEntry(label="broken", trials={0: "c"}, evaluation="e"),
        RowEntry(label="later", trials={0: "gone"}, evaluation="e"),
    ]
    return Results(
        order=["unrun", "second", "first"],
        groups={
            "first": GroupEntry(question="Why?", rows=rows),
            "second": GroupEntry(question="How?", rows=rows[:1]),
            "unrun": GroupEntry(question="When?", rows=rows[3:]),
        },
        trials={
            "a": trial(0, -0.7, 1.0),
            "b": trial(1, -0.5, 0.9),
            "c": trial(2, 0, 0, State.FAILED),
        },
    )


def test_the_table_holds_the_means_their_spread_and_what_went_wrong() -> None:
    text = section(two_groups())
    assert (
        "| variant | sequences | LensNet | seconds | lens loss | corr (control) | pairs right | lens | random |"
        in text
    )
    figures = "1,200 | 2.35 M | 25 | 0.500 | -0.600 (+0.001) | 0.750 | 0.125 ± 0.177 / 0.950 ± 0.071 | 2.000 ± 0.000 |"
    assert f"| both seeds | {figures}" in text
    assert (
        "| one \\| seed (1 of 2 seeds not run) | 1,200 | 2.35 M | 20 | 0.500 | -0.700 (+0.001) | 0.750 | 0.000 / 1.000 | 2.000 |"
        in text
    )
    assert "| broken | training failed exit 1: error: a \\| b |" in text
    assert "| later | not run |" in text
    assert text.index("### How?") < text.index("### Why?"), "the order of the plan"
    assert "When?" not in text
    call = "* `python tools/ablate.py`: 2 CPU cores; torch 2; commit: abc; 2026-01-02; 2 commands at a time.\n"
    assert text.count(call) == 2, "once for each group"
    assert (
        "Group `first`: `r.yaml`, weights of `w`; seeds 0, 1, 2, 8 sequences of `recall`." in text
    )
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_writing_replaces_what_lies_between_the_markers_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    before, after = "# Title\n\ntext  \n\n", "\n\n## Next\n\tmore\n\n\n"
    page.write_text(f"{before}{BEGIN}\nold\n{END}{after}")
    text = section(two_groups())
    for _ in range(2):
        write_section(page, text)
        assert page.read_text() == before + text.rstrip("\n") + after
    page.write_text("# Title\n")
    for _ in range(2):
        write_section(page, text)
        assert page.read_text() == f"# Title\n\n{text}"
    page.unlink()
    write_section(page, text)
    assert page.read_text() == text


@pytest.mark.parametrize("content", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_whose_markers_make_no_sense_is_left_alone(content: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(content)
    with pytest.raises(ConfigError, match="once each, in this order"):
        write_section(page, "text")
    assert page.read_text() == content


def test_a_group_says_which_rows_come_from_which_call() -> None:
    results = two_groups()
    later = MADE.model_copy(update={"command": "python tools/ablate.py --only first", "jobs": 1})
    results.trials["b"] = results.trials["b"].model_copy(update={"made": later, "init_from": None})
    results.trials["a"].evaluations["e"].made = later.model_copy(update={"commit": "def"})
    text = section(results)
    assert (
        "Group `second`: `r.yaml`, weights of `w` or `r.yaml`, trained from the start; seeds 0, 1, 8 sequences"
        in text
    )
    first = text[text.index("### Why?") :]
    assert (
        "`python tools/ablate.py`: 2 CPU cores; torch 2; commit: abc; 2026-01-02; 2 commands at a time. Rows: *both seeds*,"
        in first
    )
    assert (
        "--only first`: 2 CPU cores; torch 2; commit: abc; 2026-01-02; 1 command at a time. Rows: *both seeds*.\n"
        in first
    )
    assert (
        "commit: def; 2026-01-02; 1 command at a time. Rows: *both seeds*, *one | seed*.\n" in first
    )


# What is committed


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    page, kept = PAGE.read_text(), Results.load(KEPT)
    begin, end = page.index(BEGIN), page.index(END) + len(END)
    assert page[begin:end] == section(kept).rstrip("\n")
    assert kept.merged(Results()) == kept, "no trial or evaluation that no row shows"
    assert KEPT.read_text() == f"{kept.model_dump_json(indent=1, exclude_none=True)}\n"


# What replaces what


def only(*rows: RowEntry, **trials: TrialResult) -> Results:
    return Results(
        order=["g"], groups={"g": GroupEntry(question="Why?", rows=[*rows])}, trials=trials
    )


def row(label: str, *keys: str, evaluation: str = "e") -> RowEntry:
    return RowEntry(label=label, trials=dict(enumerate(keys)), evaluation=evaluation)


def made_anew(trial: TrialResult) -> TrialResult:
    """The same with other steps."""
    return trial.model_copy(update={"steps": trial.steps + 1})


def test_a_row_gives_way_to_one_made_otherwise_of_which_as_many_seeds_are_finished() -> None:
    good, failed = trial(0, -0.7, 1.0), trial(0, 0, 0, State.FAILED)
    new_good, new_failed = made_anew(good), made_anew(failed)
    one, half, whole = (
        only(row("x", "a"), a=good),
        only(row("x", "a", "b"), a=good, b=failed),
        only(row("x", "a", "b"), a=good, b=good),
    )
    broken, unrun = only(row("x", "b"), b=failed), only(row("x", "e"))
    new_one, new_broken = only(row("x", "c"), c=new_good), only(row("x", "d"), d=new_failed)
    new_half = only(row("x", "c", "d"), c=new_good, d=new_failed)
    new_whole = only(row("x", "c", "d"), c=new_good, d=new_good)
    for old, new, wins in (
        (one, new_one, True),
        (one, new_broken, False),
        (one, unrun, False),
        (one, new_half, True),
        (one, new_whole, True),
        (whole, new_one, False),
        (whole, new_half, False),
        (half, new_whole, True),
        (half, new_broken, False),
        (broken, new_half, True),
        (broken, unrun, False),
        (unrun, new_broken, True),
        (Results(), unrun, True),
        (one, Results(), False),
    ):
        assert old.merged(new) == (new if wins else old), (old, new)
    assert one.merged(new_whole, {"g": ["x"]}) == new_whole
    assert one.merged(new_whole, {"g": []}) == one, "not a row of this call"
    assert one.merged(new_whole, {}) == one
    assert unrun.merged(new_whole, {"g": []}) == new_whole
    assert Results(order=["g"]).merged(new_whole, {}) == Results(order=["g"])


def test_finished_seeds_made_alike_join_those_that_are_there() -> None:
    first, second, third, failed = (
        trial(0, -0.7, 1.0),
        trial(1, -0.6, 0.9),
        trial(2, -0.5, 0.8),
        trial(1, 0, 0, State.FAILED),
    )
    two = only(row("x", "a", "b"), a=first, b=second)
    alone = only(RowEntry(label="x", trials={2: "c"}, evaluation="e"), c=third)
    assert two.merged(alone) == only(row("x", "a", "b", "c"), a=first, b=second, c=third)
    assert alone.merged(two).groups["g"].rows[0].trials == {0: "a", 1: "b", 2: "c"}
    again = trial(1, -0.65, 0.95)
    assert two.merged(only(RowEntry(label="x", trials={1: "d"}, evaluation="e"), d=again)) == only(
        row("x", "a", "d"), a=first, d=again
    )
    assert two.merged(only(row("x", "a", "d"), a=first, d=failed)) == two, (
        "what failed replaces nothing"
    )
    assert only(row("x", "a", "d"), a=first, d=failed).merged(two) == two
    later = failed.model_copy(update={"reason": "again"})
    assert (
        only(row("x", "a"), a=failed).merged(only(row("x", "a"), a=later)).trials["a"].reason
        == "again"
    )


def test_trials_and_evaluations_that_no_row_shows_are_left_out() -> None:
    several = trial(0, -0.7, 1.0)
    several.evaluations["unasked"] = several.evaluations["e"]
    kept = only(row("x", "a"), a=several, gone=trial(1, -0.6, 0.9))
    cleared = kept.merged(Results())
    assert (cleared.trials.keys(), cleared.trials["a"].evaluations.keys()) == ({"a"}, {"e"})
    assert kept.merged(only(row("x", "b"), b=trial(2, -0.5, 0.8))).trials.keys() == {"b"}
    assert several.evaluations.keys() == {"e", "unasked"}, "what is merged is not changed"


def test_rows_that_share_a_key_keep_the_training_that_they_showed() -> None:
    first, second = trial(0, -0.7, 1.0), trial(0, -0.5, 0.9)
    kept = only(row("x", "a"), row("y", "a"), a=first)
    merged = kept.merged(only(row("x", "a"), row("y", "a"), a=second), {"g": ["y"]})
    x, y = (merged.trials[entry.trials[0]] for entry in merged.groups["g"].rows)
    assert (x, y) == (first, second)
    assert merged.merged(Results()) == merged
    assert merged.merged(only(row("x", "a"), row("y", "a"), a=second)) == only(
        row("x", "a"), row("y", "a"), a=second
    )


def test_further_evaluations_of_one_training_add_up() -> None:
    one, two = trial(0, -0.7, 1.0), trial(0, -0.7, 1.0)
    two.evaluations = {"f": two.evaluations["e"]}
    merged = only(row("x", "a"), a=one).merged(
        only(row("x", "a"), row("y", "a", evaluation="f"), a=two), {"g": ["y"]}
    )
    assert (merged.trials.keys(), merged.trials["a"].evaluations.keys()) == ({"a"}, {"e", "f"})
