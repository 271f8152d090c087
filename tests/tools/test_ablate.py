"""The ablation command: plans become trials, trials run side by side and are never run twice, and the page says what happened."""

import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ablation.grid import lens_parameters
from ablation.jobs import State, Stop, run_command
from ablation.page import BEGIN, END
from ablation.plan import Plan, read_plan
from ablation.provenance import git_commit, provenance, visible_gpus
from ablation.results import Results, training_metrics
from ablation.trials import Grid, fingerprint, make_grid

import tools.ablate
from mc_ds.config import ConfigError, RunConfig
from mc_ds.model.lensnet import LensNet
from tests.support.tiny_run import ROOT, TIMEOUT_S, environment, python_path, run, settings
from tools.ablate import by_base, main, parse_settings

COMMITTED = ROOT / "launch" / "ablations.yaml"

TRAIN = '''
"""Pretends to train: the temperature says how it ends."""
import json, os, pathlib, sys, time, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
temperature, folder = config["mc"]["lens_temperature"], pathlib.Path(config["out_dir"]) / config["name"]
with open(JOURNAL, "a") as journal:
    print(json.dumps(["train", config["name"], os.environ.get("CUDA_VISIBLE_DEVICES"), time.time(), os.getpid()]), file=journal)
if temperature == 9:
    print("error: it cannot | work", file=sys.stderr)
    print("a last word")
    sys.exit(3)
def begun():
    return [json.loads(line)[1] for line in open(JOURNAL) if line.startswith('["train"')]
while temperature == 8 or WAITS:
    time.sleep(0.05)
(folder / "checkpoints" / "step_1").mkdir(parents=True)
steps = config["train"]["total_steps"]
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, steps + 1):
        record = {"step": step, "mc/lens_loss": float(step), "mc/preference_corr_mean": -temperature, "mc/preference_agreement": 0.5}
        print(json.dumps(record), file=file)
with open(JOURNAL, "a") as journal:
    print(json.dumps(["trained", config["name"], os.environ.get("CUDA_VISIBLE_DEVICES"), time.time(), os.getpid()]), file=journal)
'''
EVALUATE = '''
"""Pretends to evaluate."""
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(JOURNAL, "a") as journal:
    print(json.dumps(["evaluate", given["--checkpoint"].rpartition("/")[2], given.get("--memory"), 0, 0]), file=journal)
hits = 0.25 if given.get("--memory") == "off" else 1.0
records = [
    {"task": given["--tasks"], "policy": policy, "horizon_loss": 0.5, "hit_rate": hits, "n": int(given["--samples"]), "losses": [1, 2]}
    for policy in given["--policies"].split(",")
]
json.dump(records, open(given["--out"], "w"))
'''
PLAN = """
bases:
  small: {recipe: RECIPE, steps: 20, settings: {mc.lens_warmup_steps: 4}, evaluate: {policies: [lens, random], samples: 6}}
groups:
  first:
    question: Does it matter?
    base: small
    variants:
      default: {}
      hot: {settings: {mc.lens_temperature: 2.0}}
      forgetful: {evaluate: {memory: false}}
  second:
    question: Is it the same?
    base: small
    variants:
      default: {}
      long: {steps: 2}
"""


class Bench:
    """A folder with programs that only pretend, a plan, a page, and what the programs noted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.page, self.journal = (
            folder,
            folder / "out",
            folder / "page.md",
            folder / "journal",
        )
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(settings(folder, "tiny")))
        self.plan(PLAN)
        self.pretend()
        self.page.write_text("# Page\n")

    def pretend(self, waits: str = "False") -> None:
        """A training goes on while the expression `waits` is true; `begun()` are the names of those that have begun, in order."""
        for name, text in (("train.py", TRAIN.replace("WAITS", waits)), ("evaluate.py", EVALUATE)):
            (self.folder / name).write_text(f"JOURNAL = {str(self.journal)!r}\n{text}")

    def plan(self, text: str) -> None:
        (self.folder / "ablations.yaml").write_text(
            text.replace("RECIPE", str(self.folder / "recipe.yaml"))
        )

    def call(self, *options: str) -> int:
        return main(
            [
                "--plan",
                str(self.folder / "ablations.yaml"),
                "--out",
                str(self.out),
                "--docs",
                str(self.page),
                *options,
            ]
        )

    def noted(self, kind: str) -> list[list[Any]]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [entry for entry in map(json.loads, lines) if entry[0] == kind]

    def results(self) -> Results:
        return Results.load(self.out / "results.json")

    def kept(self) -> Results:
        return Results.load(self.page.with_name("ablations.json"))

    def rows(self) -> dict[str, str]:
        """Lines of the page's tables by group and label."""
        found = {}
        for part in self.page.read_text().split("\n### ")[1:]:
            (group,) = re.findall(r"^Group `(\w+)`", part, re.MULTILINE)
            found |= {
                f"{group}/{line.split(' | ')[0][2:]}": line
                for line in part.splitlines()
                if line.startswith("| ")
            }
        return {
            name: line for name, line in found.items() if not name.endswith(("/variant", "/---"))
        }


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(tools.ablate, "LAUNCH", tmp_path)
    monkeypatch.setattr("ablation.grid.prepare_corpus", lambda config: None)
    return Bench(tmp_path)


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended may still wait for its parent to notice)."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Grid]:
    """Everything of the committed plan, with a folder for weights."""
    folder = tmp_path_factory.mktemp("weights")
    plan = read_plan(COMMITTED)
    plan = plan.with_bases("init_from", {base: str(folder) for base in plan.bases}, set(plan.bases))
    return plan, make_grid(plan, plan.select([]), seeds=[0], out=folder)


# The committed plan


def test_every_variant_of_the_committed_plan_is_a_run_that_can_be(
    committed: tuple[Plan, Grid],
) -> None:
    plan, grid = committed
    assert grid.rows.keys() == plan.groups.keys()
    defaults: dict[str, set[str]] = {base: set() for base in plan.bases}
    trainings: dict[str, set[str]] = {base: set() for base in plan.bases}
    for name, rows in grid.rows.items():
        base = plan.groups[name].base
        shown = [(row.trials[0], row.evaluation) for row in rows]
        assert len(set(shown)) == len(shown), f"{name}: two rows are the same"
        plain = [row.trials[0] for row in rows if row.label.endswith("(default)")]
        assert len(plain) == 1, f"{name}: what does the default do?"
        defaults[base].update(plain)
        trainings[base].update(row.trials[0] for row in rows)
        for config in (grid.trials[row.trials[0]].config for row in rows if base != "joint"):
            assert config.train.frozen == "all"
            assert ("lensnet" in config.train.init_parts) == (base == "two_levels"), (
                "it learns afresh, or goes on from short histories"
            )
            assert (config.mc.lens_start_step, len(config.data.recall.facts_by_stage)) == (0, 1)
    assert all(len(keys) == 1 for keys in defaults.values()), (
        "the default of a base is trained once"
    )
    assert all(len(keys) <= 28 for keys in trainings.values())


def test_the_committed_plan_asks_what_the_design_leaves_open(committed: tuple[Plan, Grid]) -> None:
    _, grid = committed
    seen: dict[str, set[Any]] = {}
    for trial in grid.trials.values():
        for name, value in trial.config.mc.model_dump().items():
            seen.setdefault(name, set()).add(str(value))
    for name, values in dict(
        lens_index=["True", "False"],
        lens_ask=["tied", "untied", "none"],
        lens_block_scores=["own", "shared"],
        lens_split_margins=["True", "False"],
        lens_objective=["pair", "entry"],
        lens_pair_baseline=["True", "False"],
        training_lod2_probability=["0.05", "0.1", "0.3"],
        training_lod2_max_share=["0.5", "1.0"],
        num_random_variants=["2", "4", "7"],
        lens_dim=["64", "128", "256"],
        lens_layers=["1", "2"],
        lens_start_step=["0", "curriculum_end"],
    ).items():
        assert set(values) <= seen[name], name
    options = [
        evaluation.options
        for trial in grid.trials.values()
        for evaluation in trial.evaluations.values()
    ]
    assert any("--memory" in given for given in options)
    assert len({given[given.index("--seq_lens") + 1] for given in options}) >= 3
    assert len({trial.config.train.total_steps for trial in grid.trials.values()}) >= 5


def test_the_options_of_evaluations_exist(committed: tuple[Plan, Grid]) -> None:
    from launch.evaluate import parse

    _, grid = committed
    for evaluation in {e for trial in grid.trials.values() for e in trial.evaluations.values()}:
        args = parse(["--checkpoint", "x", *evaluation.options])
        assert (args.tasks, int(args.seq_lens)) == (evaluation.task, evaluation.seq_len)
        assert 0 < float(args.budgets) <= 1


def test_a_longer_history_at_a_smaller_share_has_as_many_entries(
    committed: tuple[Plan, Grid],
) -> None:
    _, grid = committed
    for row, times in zip(grid.rows["transfer"], (1, 2, 4), strict=True):
        trial = grid.trials[row.trials[0]]
        evaluation = trial.evaluations[row.evaluation]
        assert evaluation.seq_len == times * 1024
        budget = float(evaluation.options[evaluation.options.index("--budgets") + 1])
        assert budget * evaluation.seq_len == pytest.approx(trial.config.mc.train_wc_length)


# Plans


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("base: small", "base: smal"),
            r"groups\.first\.base = 'smal' is not among the bases small",
        ),
        (
            ("mc.lens_temperature", "mc.lens_temprature"),
            r"^first/hot: unknown key --mc\.lens_temprature: did you mean --mc\.lens_temperature",
        ),
        (("2.0}", "-2.0}"), r"^first/hot: mc\.lens_temperature = .*-2"),
        (
            ("memory: false", "memori: false"),
            r"groups\.first\.variants\.forgetful\.evaluate: .*memori",
        ),
        (
            ("{steps: 2}", "{settings: {train.total_steps: 2}}"),
            r"second\.variants\.long: train\.total_steps is decided by the command",
        ),
        (("{steps: 2}", "{stepz: 2}"), r"unknown key .*stepz"),
        (("RECIPE", "/nowhere.yaml"), r"^first/default: --config /nowhere\.yaml: cannot read"),
        (("small: {", "small: {settings: {train.frozen: all}, "), r"duplicate key 'settings'"),
        (
            ("steps: 20,", "steps: 20, init_from: /nowhere,"),
            r"base small: init_from = /nowhere: no such folder",
        ),
        (
            ("{mc.lens_warmup_steps: 4}", "{train.frozen: all}"),
            r"base small starts from trained weights: give --init_from small=PATH",
        ),
    ],
)
def test_plans_that_cannot_work_are_refused_in_one_line_before_anything_runs(
    change: tuple[str, str], message: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PLAN.replace(*change)
    assert text != PLAN
    bench.plan(text)
    assert bench.call() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error.removeprefix("error: ")), error
    assert not bench.journal.exists()
    assert bench.page.read_text() == "# Page\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--only", "frist"],
            "--only frist: the plan has no such group or variant: did you mean 'first'",
        ),
        (["--seed=3"], "command line: seed is decided by the command"),
        (["--mc.lens_dimm", "3"], "unknown key --mc.lens_dimm"),
        (["--recipe", "large=x.yaml"], "--recipe large=x.yaml: no base of that name, use small"),
        (["loose"], "unexpected argument 'loose'"),
        (["--mc.lens_dim"], "unexpected argument '--mc.lens_dim'"),
        (["--plan", "/nowhere"], "--plan /nowhere: no such file"),
        (
            ["--mc.lens_temperature=3"],
            "--mc.lens_temperature: rows of group first decide mc.lens_temperature ('hot')",
        ),
        (
            ["--only", "first/default", "--mc.lens_temperature=3"],
            "rows of group first decide mc.lens_temperature ('hot')",
        ),
        (
            ["--only", "first", '--mc={"lens_temperature": 3}'],
            "--mc: rows of group first decide mc.lens_temperature ('hot')",
        ),
        (
            ["--only", "first", "--focus.memory", "false"],
            "--focus.memory: rows of group first decide focus.memory ('forgetful')",
        ),
        (["--only", "first", "--mc.lens_temperature=3", "--list"], "leave one of the two out"),
        (["--config=x.yaml"], "command line: config is decided by the command"),
        (["--train.init_from=x"], "command line: train.init_from is decided by the command"),
        (
            ["--docs", "/nonexistent/page.md"],
            "--docs /nonexistent/page.md: give a file, in a folder that exists",
        ),
        (["--docs", "/"], "--docs /: give a file"),
    ],
)
def test_command_lines_that_cannot_work_are_refused(
    options: list[str], message: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.call(*options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert (error.startswith("error: "), error.count("\n")) == (True, 1)
    assert not bench.journal.exists()
    assert not bench.out.exists()


def test_a_setting_that_no_row_of_the_chosen_groups_decides_can_be_overridden(
    committed: tuple[Plan, Grid],
) -> None:
    plan, _ = committed
    plan.refuse_decided(
        ["mc.lens_index_white", "mc.lens_dim", "focus.memory"], ["index", "ask", "transfer"]
    )
    for given, group in (
        ("mc.lens_dim", "size"),
        ("focus.memory", "memory"),
        ("focus.iterations", "memory"),
        ("mc", "variants"),
    ):
        with pytest.raises(ConfigError, match=f"^--{given}: rows of group {group} decide {given}"):
            plan.refuse_decided([given], ["transfer", group])


def test_a_path_without_a_base_belongs_to_the_only_one_used(tmp_path: Path) -> None:
    plan = read_plan(COMMITTED)
    assert by_base(["a.yaml", "joint=b=c.yaml"]) == {None: "a.yaml", "joint=b": "c.yaml"}
    changed = plan.with_bases("recipe", {None: "a.yaml"}, {"joint"})
    assert (changed.bases["joint"].recipe, changed.bases["one_level"].recipe) == (
        "a.yaml",
        plan.bases["one_level"].recipe,
    )
    with pytest.raises(ConfigError, match=r"say of which base \(joint, one_level\)"):
        plan.with_bases("recipe", {None: "a.yaml"}, {"joint", "one_level"})


def test_settings_are_given_as_for_training() -> None:
    assert parse_settings(["--a.b=1=2", "--c", "x y", "--d=-1"]) == {
        "a.b": "1=2",
        "c": "x y",
        "d": "-1",
    }


# Trials


def grid_of(bench: Bench, **options: Any) -> Grid:
    plan = read_plan(bench.folder / "ablations.yaml")
    return make_grid(
        plan,
        plan.select(options.pop("only", [])),
        seeds=options.pop("seeds", [0]),
        out=bench.out,
        **options,
    )


def test_rows_share_trainings(bench: Bench) -> None:
    grid = grid_of(bench, seeds=[0, 3])
    default, hot, forgetful = grid.rows["first"]
    again, long = grid.rows["second"]
    assert default.trials == forgetful.trials == again.trials
    assert default.evaluation == again.evaluation != forgetful.evaluation
    assert (
        len({*default.trials.values(), *hot.trials.values(), *long.trials.values()})
        == len(grid.trials)
        == 6
    )
    assert [grid.trials[key].config.seed for key in default.trials.values()] == [0, 3]
    assert [trial.config.train.total_steps for trial in grid.wanted()] == [
        40,
        40,
        20,
        20,
        20,
        20,
    ], "the longest first"


def test_names_may_hold_commas(committed: tuple[Plan, Grid]) -> None:
    plan, _ = committed
    long = ["lod2_share/no bound, probability 0.1", "lod2_share/no bound, probability 0.3"]
    assert plan.split_names(f"blocks,{long[0]},{long[1]}, white") == ["blocks", *long, "white"]
    assert plan.select(plan.split_names(",".join(long))) == {
        "lod2_share": ["no bound, probability 0.1", "no bound, probability 0.3"]
    }
    assert plan.split_names("") == []
    assert plan.split_names("no such, white") == ["no such", "white"]


def test_only_what_is_wanted_is_run_and_groups_keep_all_rows(bench: Bench) -> None:
    grid = grid_of(bench, only=["first/forgetful"])
    assert grid.rows.keys() == {"first"}
    assert [row.wanted for row in grid.rows["first"]] == [False, False, True]
    (trial,) = grid.wanted()
    assert [*trial.evaluations] == [grid.rows["first"][2].evaluation]


def test_steps_scale_with_their_warm_ups_and_overrides_win(bench: Bench) -> None:
    def steps(**options: Any) -> list[tuple[int, int, int]]:
        configs = [
            trial.config
            for trial in (
                grid.trials[row.trials[0]]
                for grid in [grid_of(bench, **options)]
                for row in grid.rows["second"]
            )
        ]
        return [
            (c.train.total_steps, c.train.warmup_steps, c.mc.lens_warmup_steps) for c in configs
        ]

    assert steps() == [(20, 2, 4), (40, 4, 8)]
    assert steps(steps=5) == [(5, 0, 1), (10, 1, 2)]
    assert steps(steps=5, overrides={"mc.lens_warmup_steps": "3"}) == [(5, 0, 3), (10, 1, 3)]
    hot = grid_of(bench, only=["second"], overrides={"mc.lens_temperature": "7"})
    assert {trial.config.mc.lens_temperature for trial in hot.trials.values()} == {7}


def test_the_last_stage_of_a_curriculum_from_the_start(bench: Bench) -> None:
    text = PLAN.replace("steps: 20,", "steps: 20, last_stage: true,").replace(
        "mc.lens_warmup_steps: 4", "data.recall.facts_by_stage: [2, 5, 9]"
    )
    bench.plan(text)
    assert {
        tuple(trial.config.data.recall.facts_by_stage) for trial in grid_of(bench).trials.values()
    } == {(9,)}


def test_a_fingerprint_is_of_what_decides_the_figures(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "manifest.json").write_text("{}")

    def of(folder: Path = weights, called: str = "a", **changes: Any) -> str:
        config = settings(tmp_path, called, **changes)
        config["train"] |= {"init_from": str(folder)}
        config["data"] |= {"tokenizer": str(folder)}
        return fingerprint(RunConfig.model_validate(config))

    first = of()
    assert first == of(
        called="b", out_dir="elsewhere", telemetry=dict(progress=True), data=dict(num_workers=3)
    )
    assert first != of(seed=1)
    assert first != of(mc=dict(lens_temperature=0.7))
    assert first != of(data=dict(val_fraction=0.2))
    moved = tmp_path / "moved"
    shutil.copytree(weights, moved)
    assert first == of(moved)
    (weights / "manifest.json").write_text('{"other": 1}')
    assert first != of()


def test_weights_of_a_run_are_known_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "lens.pt"

    def of() -> str:
        config = settings(tmp_path, "a")
        config["train"] |= {"init_from": str(tmp_path)}
        return fingerprint(RunConfig.model_validate(config))

    path.write_text("1")
    first = of()
    path.write_text("12")
    assert of() != first


# Running


def test_everything_runs_once_and_a_second_call_has_nothing_to_do(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.call("--jobs", "2") == 0
    assert len(bench.noted("train")) == 3, "five rows, three trainings"
    assert sorted(entry[2] or "" for entry in bench.noted("evaluate")) == ["", "", "", "off"]
    page = bench.page.read_text()
    assert page.startswith("# Page\n\n" + BEGIN)
    journal = bench.journal.read_text()
    assert bench.call("--jobs", "2") == 0
    assert bench.journal.read_text() == journal
    assert bench.page.read_text() == page
    assert capsys.readouterr().out.count("known ") == 3
    bench.plan(
        PLAN.replace(
            "long: {steps: 2}",
            "long: {steps: 2}\n      new: {settings: {mc.lens_temperature: 3.0}}",
        )
    )
    assert bench.call() == 0
    assert len(bench.noted("train")) == 4
    bench.plan(
        PLAN.replace("forgetful: {evaluate: {memory: false}}", "blunt: {evaluate: {iterations: 1}}")
    )
    assert bench.call() == 0
    assert (len(bench.noted("train")), len(bench.noted("evaluate"))) == (4, 6), (
        "what is trained is evaluated"
    )


def test_a_trial_without_its_checkpoint_is_trained_again_for_a_new_evaluation(bench: Bench) -> None:
    assert bench.call("--only", "first", "--remove_checkpoints") == 0
    assert not [*bench.out.glob("runs/*/checkpoints")]
    assert bench.call("--only", "first", "--remove_checkpoints") == 0
    assert len(bench.noted("train")) == 2
    assert bench.call("--only", "first", "--samples", "7") == 0
    assert len(bench.noted("train")) == 4


class Patience:
    """Says that the call goes on, once `ready`: the time limit of a command is looked at after that."""

    def __init__(self, ready: Callable[[], object]) -> None:
        self.ready = ready

    def __bool__(self) -> bool:
        while not self.ready():
            time.sleep(0.05)
        return False


def test_what_fails_or_hangs_is_a_row_and_the_rest_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what hangs has the time limit, and not before it has begun: the machine may be busy."""

    def run(command: list[str], *, log: Path, timeout_s: float, stop: Any, **options: Any) -> Any:
        if hangs := log.name.startswith("second-long"):
            name, times = log.name.removesuffix(".train.log"), len(bench.noted("train"))
            stop = Patience(lambda: name in [entry[1] for entry in bench.noted("train")[times:]])
        return run_command(
            command,
            log=log,
            timeout_s=timeout_s if hangs else TIMEOUT_S,
            stop=stop,
            **options,
        )

    monkeypatch.setattr("ablation.grid.run_command", run)
    bench.plan(
        PLAN.replace(
            "hot: {settings: {mc.lens_temperature: 2.0}}",
            "hot: {settings: {mc.lens_temperature: 9.0}}",
        ).replace("long: {steps: 2}", "long: {settings: {mc.lens_temperature: 8.0}}")
    )
    assert bench.call("--jobs", "3", "--timeout_s", "1.5") == 1
    table = bench.page.read_text()
    assert "| hot | training failed exit 3: error: it cannot \\| work |" in table
    assert "| long | training timed out after 1.5 s |" in table
    assert re.search(r"\| default \| 80 \|.*\| 0\.500 / 1\.000 \| 0\.500 / 1\.000 \|", table)
    (hung,) = [entry for entry in bench.noted("train") if entry[1].startswith("second-long")]
    assert not alive(hung[4])
    before = len(bench.noted("train"))
    bench.call("--jobs", "2", "--timeout_s", "1")
    assert len(bench.noted("train")) == before + 2, (
        "failed ones are tried again, finished ones are not"
    )


def test_an_evaluation_that_fails_is_tried_again_without_training(bench: Bench) -> None:
    program = bench.folder / "evaluate.py"
    good = program.read_text()
    program.write_text("print('error: no such policy')\nraise SystemExit(2)")
    assert bench.call("--only", "second/default") == 1
    assert "| default | evaluation failed exit 2: error: no such policy |" in bench.page.read_text()
    program.write_text("print('fine')")
    assert bench.call("--only", "second/default") == 1
    assert "its records cannot be read" in bench.page.read_text()
    program.write_text(good)
    assert bench.call("--only", "second/default") == 0
    assert len(bench.noted("train")) == 1


def test_jobs_run_side_by_side_each_gpu_in_turn(bench: Bench) -> None:
    bench.pretend(waits="len(begun()) < 4")
    options = ["--gpus", "0,1", "--seeds", "0,1", "--only", "first/default,second"]
    assert bench.call("--jobs", "4", *options) == 0
    events = sorted(
        (entry[3], entry[0], entry[2])
        for kind in ("train", "trained")
        for entry in bench.noted(kind)
    )
    running: list[str] = []
    most = 0
    for _, kind, gpu in events:
        running.append(gpu) if kind == "train" else running.remove(gpu)
        assert running.count(gpu) <= 2
        most = max(most, len(running))
    assert most == 4, "two seeds of two trainings"
    assert {entry[2] for entry in bench.noted("train")} == {"0", "1"}


def test_when_time_is_up_nothing_stays_and_the_next_call_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.pretend(waits='begun()[0] != config["name"]')  # the second one would never end
    clock = SimpleNamespace(
        monotonic=lambda: 2.0 if len(bench.noted("train")) == 2 else 0.0, sleep=time.sleep
    )
    with monkeypatch.context() as patch:
        patch.setattr("ablation.jobs.time", clock)
        assert bench.call("--jobs", "1", "--time_limit_s", "1.8") == 1
    assert (len(bench.noted("train")), len(bench.noted("trained"))) == (2, 1)
    assert not [entry for entry in bench.noted("train") if alive(entry[4])]
    assert len(bench.results().trials) == 1, "what was interrupted is no result"
    bench.pretend()
    assert bench.call("--jobs", "3") == 0
    assert len(bench.noted("trained")) == 3, "and nothing that was finished is run again"


def test_a_call_that_ends_before_any_result_writes_no_page(bench: Bench) -> None:
    assert bench.call("--time_limit_s", "0") == 1
    assert bench.page.read_text() == "# Page\n"
    assert not bench.journal.exists()


def test_listing_runs_nothing(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.call("--only", "second") == 0
    capsys.readouterr()
    assert bench.call("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["known", "open", "open"], (
        "the default is open for its other evaluation"
    )
    assert len(bench.noted("train")) == 2


def test_a_run_keeps_its_settings_and_reports_to_its_record_alone(bench: Bench) -> None:
    assert bench.call("--only", "first/hot", "--mc.lens_lr=0.125") == 0
    (recipe,) = bench.out.glob("recipes/first-hot-*.yaml")
    config = yaml.safe_load(recipe.read_text())
    assert (config["mc"]["lens_temperature"], config["mc"]["lens_lr"]) == (2.0, 0.125)
    assert (config["telemetry"]["wandb"], config["telemetry"]["progress"], config["resume"]) == (
        False,
        False,
        "never",
    )
    assert config["out_dir"] == str(bench.out / "runs")
    (trial,) = bench.results().trials.values()
    assert trial.command.startswith("python ")
    assert trial.made.command.endswith("--mc.lens_lr=0.125")
    assert (trial.steps, trial.sequences) == (20, 80)
    run_config = RunConfig.model_validate(config)
    assert (
        trial.parameters
        == lens_parameters(run_config)
        == sum(p.numel() for p in LensNet(run_config.mc, dim=32).parameters())
    )


def test_processes_that_ignore_a_request_are_ended_with_their_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ablation.jobs.GRACE_S", 0.3)
    script = tmp_path / "stubborn.py"
    script.write_text(
        textwrap.dedent("""
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); signal.pause()"])
        print(child.pid, flush=True)
        signal.pause()
        """)
    )
    stop, log = Stop(), tmp_path / "log"

    def ask_when_both_ignore() -> None:
        while not log.exists() or log.read_text().count("\n") < 2:
            time.sleep(0.05)
        stop.ask()

    threading.Thread(target=ask_when_both_ignore).start()
    outcome = run_command(
        [sys.executable, str(script)], log=log, environ={}, timeout_s=TIMEOUT_S, stop=stop
    )
    assert outcome.state is State.STOPPED
    deadline = time.monotonic() + TIMEOUT_S  # it has been killed; its end may take a while
    while alive(int(log.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(log.read_text()))


# Figures


def test_training_figures_are_means_over_the_last_fifth_of_lensnets_steps(tmp_path: Path) -> None:
    records = [{"step": step, "train/loss": 3.0} for step in range(1, 6)]
    records += [
        {
            "step": 5 + n,
            "mc/lens_loss": n,
            "mc/preference_corr_mean": None if n == 10 else -n,
            "val/loss": 1.0,
        }
        for n in range(1, 11)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert training_metrics(tmp_path) == {"lens_loss": 9.5, "corr": -9.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(records[0]))
    assert training_metrics(tmp_path) == {}


def test_visible_gpus_are_named_as_the_environment_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert visible_gpus() == ["5", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]


def test_provenance_says_what_it_ran_on() -> None:
    made = provenance("python tools/ablate.py", 3)
    assert date.fromisoformat(made.date)
    assert "torch" in made.versions
    assert re.fullmatch(r"[0-9a-f]{7,}( with changes)?|unknown", git_commit())
    assert provenance("", 1, "r7").commit == "r7"


# The page


def test_the_page_can_be_written_from_kept_results_alone(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.call() == 0
    page, kept = bench.page.read_text(), bench.page.with_name("ablations.json")
    bench.page.write_text("# Page\n")
    shutil.rmtree(bench.out / "runs")
    (bench.folder / "ablations.yaml").unlink()
    assert bench.call("--table_only") == 0
    assert bench.page.read_text() == page
    results = (bench.out / "results.json").read_text()
    (bench.out / "results.json").write_text('{"format": 2, "trials": 3}')
    assert bench.call("--table_only") == 2
    shutil.rmtree(bench.out)
    bench.page.write_text("# Page\n")
    assert bench.call("--table_only") == 0, "what lies beside the page is enough"
    assert bench.page.read_text() == page
    capsys.readouterr()
    kept.unlink()
    assert bench.call("--table_only") == 2
    assert "has tables, but" in capsys.readouterr().err
    bench.page.write_text("# Page\n")
    assert bench.call("--table_only") == 2
    assert "nothing to write" in capsys.readouterr().err
    bench.out.mkdir()
    (bench.out / "results.json").write_text(results)
    assert bench.call("--table_only") == 0, "or what the output folder has"
    assert bench.page.read_text() == page
    assert Results.load(kept) == Results().merged(Results.model_validate_json(results))


def test_damaged_results_beside_the_page_are_refused_before_anything_runs(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = bench.page.with_name("ablations.json")
    for content in ('{"format": 2, "trials": 3}', "<<<<<<< ours", "{}\n{}", '{"format": 1}'):
        kept.write_text(content)
        assert bench.call() == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {kept} is not what this version of the command writes")
        assert error.count("\n") == 1
        assert (kept.read_text(), bench.page.read_text()) == (content, "# Page\n")
    assert not bench.journal.exists()


def test_a_page_with_broken_markers_is_refused_before_anything_runs(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.page.write_text(f"{END}\n{BEGIN}")
    assert bench.call() == 2
    assert "once each, in this order" in capsys.readouterr().err
    assert not bench.journal.exists()


# Results that add up


def test_calls_add_up_on_one_page(bench: Bench) -> None:
    assert bench.call("--only", "second") == 0
    assert bench.call("--only", "first") == 0
    page = bench.page.read_text()
    assert page.index("### Does it matter?") < page.index("### Is it the same?")
    assert "--only second" in page
    assert "--only first" in page


def test_a_call_with_another_folder_replaces_its_own_rows_alone(bench: Bench) -> None:
    assert bench.call() == 0
    before, kept = bench.rows(), bench.kept()
    shutil.rmtree(bench.out)
    assert bench.call("--only", "first/forgetful", "--samples", "7") == 0
    after = bench.rows()
    assert {name for name in after if after[name] != before[name]} <= {"first/forgetful"}
    assert [*after] == [*before]
    page = bench.page.read_text()
    first = page[page.index("Does it matter?") : page.index("Is it the same?")]
    assert re.search(r"--only first/forgetful --samples 7`: .*Rows: \*forgetful\*\.\n", first)
    assert "6 sequences of `recall` or 7 sequences of `recall`" in first
    assert "--samples" not in page[page.index("Is it the same?") :], (
        "rows of the same settings keep the training that they showed"
    )
    shared = {
        row.label: [bench.kept().trials[key].made for key in row.trials.values()]
        for row in bench.kept().groups["first"].rows
    }
    assert (
        shared["default"]
        == [kept.trials[key].made for key in kept.groups["first"].rows[0].trials.values()]
        != shared["forgetful"]
    )


def test_groups_and_rows_that_a_plan_does_not_know_stay(bench: Bench) -> None:
    assert bench.call() == 0
    before = bench.rows()
    shutil.rmtree(bench.out)
    bench.plan(
        PLAN.split("  second:")[0].replace(
            "hot: {settings: {mc.lens_temperature: 2.0}}",
            "cold: {settings: {mc.lens_temperature: 0.5}}",
        )
    )
    assert bench.call("--only", "first/cold") == 0
    after = bench.rows()
    assert after.keys() == {*before, "first/cold"}
    assert {name: after[name] for name in before} == before
    assert [name for name in after if name.startswith("first")] == [
        "first/default",
        "first/cold",
        "first/forgetful",
        "first/hot",
    ]


def test_what_fails_or_does_not_run_replaces_nothing_that_is_finished(bench: Bench) -> None:
    assert bench.call() == 0
    before = bench.rows()
    shutil.rmtree(bench.out)
    bench.plan(
        PLAN.replace("mc.lens_temperature: 2.0", "mc.lens_temperature: 9.0").replace(
            "long: {steps: 2}",
            "long: {steps: 2}\n      new: {settings: {mc.lens_temperature: 9.0}}",
        )
    )
    assert bench.call("--time_limit_s", "0") == 1
    assert bench.rows() == before
    assert bench.call() == 1
    after = bench.rows()
    assert {name: re.sub(r"\| \d+ \|", "", after[name]) for name in before} == {
        name: re.sub(r"\| \d+ \|", "", line) for name, line in before.items()
    }
    assert "training failed" in after["second/new"]
    assert "training failed" not in after["first/hot"]
    assert bench.page.read_text().count("--time_limit_s") == 0


# With the programs themselves


@pytest.mark.slow
def test_a_grid_on_a_real_backbone(tmp_path: Path) -> None:
    """Trains a backbone, then LensNets alone on it, by the real commands; a second call is stopped by a signal and goes on."""
    shape = dict(
        mc=dict(
            seq_len=256,
            block_size=8,
            max_lod=1,
            train_wc_length=144,
            recent_tokens=64,
            horizon_tokens=18,
        )
    )
    data = dict(
        tasks={"recall": 1.0},
        recall=dict(facts_by_stage=[3, 12]),
        vocab_size=2048,
        cache_dir=str(tmp_path / "cache"),
    )
    short = dict(
        train=dict(total_steps=3, warmup_steps=1),
        validation=dict(eval_interval=0),
        checkpoint=dict(interval=0),
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings(tmp_path, "backbone", **shape, data=data, **short)))
    alone = {
        "train.frozen": "all",
        "train.init_parts": ["backbone", "gistnet"],
        "mc.lens_start_step": 0,
    }
    base = dict(
        recipe=str(recipe),
        steps=4,
        last_stage=True,
        settings=alone,
        evaluate=dict(samples=4, batch_size=4),
    )
    index = dict(
        question="Index?",
        base="one",
        variants={"with": {}, "without": {"settings": {"mc.lens_index": False}}},
    )
    memory = dict(
        question="Memory?",
        base="one",
        variants={"with": {}, "without": {"evaluate": {"memory": False, "iterations": 2}}},
    )
    (tmp_path / "plan.yaml").write_text(
        json.dumps(dict(bases={"one": base}, groups=dict(index=index, memory=memory)))
    )
    environ = environment(tmp_path) | {
        "PYTHONPATH": python_path(ROOT)
    }  # the whole library: keys need a vocabulary
    trained = run([sys.executable, "launch/train.py", "--config", recipe], environ)
    assert trained.returncode == 0, trained.stderr[-3000:]
    files = {"--plan": "plan.yaml", "--out": "out", "--docs": "page.md"}
    command = [
        sys.executable,
        "tools/ablate.py",
        *(str(part) for name, file in files.items() for part in (name, tmp_path / file)),
    ]
    command += [
        "--init_from",
        f"one={tmp_path / 'runs' / 'backbone'}",
        "--jobs",
        "2",
        "--train.compile=off",
    ]

    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("starts"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(TIMEOUT_S) == 1
    done = run(command, environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = Results.load(tmp_path / "out" / "results.json")
    assert len(results.trials) == 2
    assert all(
        {"lens_loss", "corr", "control", "agreement"} == trial.metrics.keys()
        for trial in results.trials.values()
    )
    with_index, without = sorted(results.trials.values(), key=lambda trial: trial.name)
    assert with_index.parameters > without.parameters
    for evaluated in (e for trial in results.trials.values() for e in trial.evaluations.values()):
        assert [record["policy"] for record in evaluated.records] == [
            "lens",
            "blind",
            "other_question",
            "random",
            "recency",
        ]
        assert all(record["hit_rate"] is not None for record in evaluated.records)
    assert "Memory?" in (tmp_path / "page.md").read_text()
