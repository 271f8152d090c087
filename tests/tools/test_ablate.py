"""The ablation command: plans become trials, trials run side by side and are never run twice,
and tables say what happened.
"""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ablation.commands import Stop, run_command
from ablation.plan import Plan, read_plan
from ablation.runner import provenance, visible_gpus
from ablation.tables import training_metrics
from ablation.trials import Row, fingerprint, make_rows

import tools.ablate
from mc_ds.config import ConfigError, RunConfig
from tests.support.processes import ROOT, inherited
from tests.support.tiny_run import ONLY_CPU, TIMEOUT_S, run, settings
from tools.ablate import main, pairs

COMMITTED = ROOT / "tools" / "ablations.yaml"

TRAIN = """
import json, os, pathlib, sys, time, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
temperature, folder = config["mc"]["lens_temperature"], pathlib.Path(config["out_dir"]) / config["name"]
def note(kind):
    with open(JOURNAL, "a") as journal:
        print(json.dumps([kind, config["name"], os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()]), file=journal)
note("train")
if temperature == 9:
    print("error: it cannot | work", file=sys.stderr)
    print("a last word")
    sys.exit(3)
if temperature == 8:
    time.sleep(60)
if BARRIER:
    while open(JOURNAL).read().count('"train"') < BARRIER:
        time.sleep(0.02)
(folder / "checkpoints" / "step_1").mkdir(parents=True)
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, config["train"]["total_steps"] + 1):
        record = {"step": step, "mc/lens_loss": float(step), "mc/preference_corr_mean": -temperature, "mc/preference_agreement": 0.5}
        print(json.dumps(record), file=file)
note("trained")
"""
EVALUATE = """
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(JOURNAL, "a") as journal:
    print(json.dumps(["evaluate", given["--checkpoint"].rpartition("/")[2], given.get("--memory"), 0]), file=journal)
hits = 0.25 if given.get("--memory") == "off" else 1.0
records = [
    {"task": given["--tasks"], "policy": policy, "horizon_loss": 0.5, "hit_rate": hits, "n": int(given["--samples"])}
    for policy in given["--policies"].split(",")
]
json.dump(records, open(given["--out"], "w"))
"""
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
    """A folder with programs that only pretend, a plan, and what the programs noted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.journal = folder, folder / "out", folder / "journal"
        (folder / "recipe.yaml").write_text(json.dumps(settings(folder, "tiny")))
        (folder / "launch").mkdir()
        self.plan(PLAN)
        self.pretend()

    def pretend(self, barrier: int = 0) -> None:
        """With a `barrier` no training ends before so many have begun."""
        for name, text in (("train.py", TRAIN), ("evaluate.py", EVALUATE)):
            head = f"JOURNAL, BARRIER = {str(self.journal)!r}, {barrier}"
            (self.folder / "launch" / name).write_text(f"{head}\n{text}")

    def plan(self, text: str) -> None:
        recipe = str(self.folder / "recipe.yaml")
        (self.folder / "plan.yaml").write_text(text.replace("RECIPE", recipe))

    def call(self, *options: str) -> int:
        plan = str(self.folder / "plan.yaml")
        return main(["--plan", plan, "--out", str(self.out), *options])

    def noted(self, kind: str) -> list[list[Any]]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [entry for entry in map(json.loads, lines) if entry[0] == kind]

    def table(self, group: str) -> str:
        return (self.out / "tables" / f"{group}.md").read_text()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(tools.ablate, "ROOT", tmp_path)
    monkeypatch.setattr("ablation.runner.open_data", lambda config: None)
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


def rows_of(
    plan: Plan, folder: Path, *, seeds: tuple[int, ...] = (0,), **more: Any
) -> dict[str, list[Row]]:
    given = dict(weights={}, overrides={}) | more
    return make_rows(
        plan, plan.select([], given["overrides"]), seeds=seeds, out=folder / "out", **given
    )


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, dict[str, list[Row]]]:
    """Everything of the committed plan, with a folder for weights."""
    folder = tmp_path_factory.mktemp("weights")
    plan = read_plan(COMMITTED)
    return plan, rows_of(plan, folder, weights={base: str(folder) for base in plan.bases})


# The committed plan


def test_every_variant_of_the_committed_plan_is_a_run_that_can_be(
    committed: tuple[Plan, dict[str, list[Row]]],
) -> None:
    plan, groups = committed
    defaults: dict[str, set[Path]] = {base: set() for base in plan.bases}
    for name, rows in groups.items():
        base = plan.groups[name].base
        assert len({row.runs[0][1] for row in rows}) == len(rows), f"{name}: two rows are the same"
        plain = [row.runs[0][0] for row in rows if row.label.endswith("(default)")]
        assert len(plain) == 1, f"{name}: what does the default do?"
        defaults[base].add(plain[0].folder)
        for config in (row.runs[0][0].config for row in rows if base != "joint"):
            assert config.train.frozen == "all"
            assert ("lensnet" in config.train.init_parts) == (base == "two_levels"), (
                "it learns afresh, or goes on from short histories"
            )
            assert (config.mc.lens_start_step, len(config.data.recall.facts_by_stage)) == (0, 1)
    assert all(len(folders) == 1 for folders in defaults.values()), (
        "a base's default is trained once"
    )


def test_the_options_of_evaluations_exist_and_a_longer_history_has_as_many_entries(
    committed: tuple[Plan, dict[str, list[Row]]],
) -> None:
    from launch.evaluate import parse

    _, groups = committed
    for row in (row for rows in groups.values() for row in rows):
        trial, records = row.runs[0]
        args = parse(["--checkpoint", "x", *trial.evaluations[records]])
        assert 0 < float(args.budgets) <= 1
        assert float(args.budgets) * int(args.seq_lens) == pytest.approx(
            trial.config.mc.train_wc_length
        )


# Plans


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("base: small", "base: smal"),
            r"groups\.first\.base = 'smal': should be one of small",
        ),
        (
            ("mc.lens_temperature", "mc.lens_temprature"),
            r"^first/hot: unknown key --mc\.lens_temprature: did you mean --mc\.lens_temperature",
        ),
        (("2.0}", "-2.0}"), r"^first/hot: mc\.lens_temperature = .*-2"),
        (("memory: false", "memori: false"), r"^first/forgetful: .*memori"),
        (
            ("{steps: 2}", "{settings: {train.total_steps: 2}}"),
            r"second\.variants\.long: train\.total_steps is set by ablate.py",
        ),
        (("{steps: 2}", "{stepz: 2}"), r"unknown key .*stepz"),
        (("RECIPE", "/nowhere.yaml"), r"^first/default: --config /nowhere\.yaml: cannot read"),
        (("small: {", "small: {settings: {train.frozen: all}, "), r"duplicate key 'settings'"),
        (
            ("{mc.lens_warmup_steps: 4}", "{train.frozen: all}"),
            r"base small needs initial weights: give --init_from small=PATH",
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
    assert not bench.out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "frist"], "--only frist: the plan has no such group: did you mean first?"),
        (["--seed=3"], "command line: seed is set by ablate.py"),
        (["--mc.lens_dimm=3"], "unknown key --mc.lens_dimm"),
        (
            ["--init_from", "large=x"],
            "--init_from large=...: there is no such base: use one of small",
        ),
        (["--init_from", "small=/nowhere"], "--init_from small=/nowhere: no such folder"),
        (["loose"], "unexpected argument 'loose'"),
        (["--plan", "/nowhere"], "--plan /nowhere: no such file"),
        (["--mc.lens_temperature=3"], "--mc.lens_temperature: row first/hot sets it too"),
        (["--only", "first", '--mc={"lens_dim": 3}'], "--mc: row first/hot sets it too"),
        (["--train.init_from=x"], "command line: train.init_from is set by ablate.py"),
    ],
)
def test_command_lines_that_cannot_work_are_refused(
    options: list[str], message: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.call(*options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert (error.startswith("error: "), error.count("\n")) == (True, 1)
    assert not bench.out.exists()


def test_settings_are_pairs() -> None:
    assert pairs("--", ["a.b=1=2", "d=-1"]) == {"a.b": "1=2", "d": "-1"}
    with pytest.raises(ConfigError, match="unexpected argument 'x'"):
        pairs("--", ["x"])


# Trials


def test_rows_share_trainings(bench: Bench) -> None:
    rows = rows_of(read_plan(bench.folder / "plan.yaml"), bench.folder, seeds=(0, 3))
    default, hot, forgetful = rows["first"]
    again, long = rows["second"]
    assert default.runs == again.runs
    assert [trial for trial, _ in default.runs] == [trial for trial, _ in forgetful.runs]
    assert not {records for _, records in default.runs} & {records for _, records in forgetful.runs}
    folders = {trial.folder for row in (default, hot, long) for trial, _ in row.runs}
    assert len(folders) == 6
    assert [trial.config.seed for trial, _ in default.runs] == [0, 3]


def test_warm_ups_follow_the_steps_and_overrides_win(bench: Bench) -> None:
    plan = read_plan(bench.folder / "plan.yaml")

    def steps(**overrides: str) -> list[tuple[int, int, int]]:
        rows = rows_of(plan, bench.folder, overrides=overrides)["second"]
        configs = [row.runs[0][0].config for row in rows]
        return [
            (c.train.total_steps, c.train.warmup_steps, c.mc.lens_warmup_steps) for c in configs
        ]

    assert steps() == [(20, 2, 4), (40, 4, 8)]
    assert steps(**{"mc.lens_warmup_steps": "3"}) == [(20, 2, 3), (40, 4, 3)]


def test_the_last_stage_of_a_curriculum_from_the_start(bench: Bench) -> None:
    text = PLAN.replace("steps: 20,", "steps: 20, last_stage: true,")
    bench.plan(text.replace("mc.lens_warmup_steps: 4", "data.recall.facts_by_stage: [2, 5, 9]"))
    rows = rows_of(read_plan(bench.folder / "plan.yaml"), bench.folder)["first"]
    assert {tuple(row.runs[0][0].config.data.recall.facts_by_stage) for row in rows} == {(9,)}


def test_a_fingerprint_is_of_what_decides_the_figures(tmp_path: Path) -> None:
    bundle, trained = tmp_path / "bundle", tmp_path / "run"
    for folder in (bundle, trained):
        folder.mkdir()
    manifest, weights = bundle / "manifest.json", trained / "lens.pt"

    def of(folder: Path, called: str = "a", **changes: Any) -> str:
        config = settings(tmp_path, called, **changes)
        config["train"] |= {"init_from": str(folder)}
        return fingerprint(RunConfig.model_validate(config))

    for file in (manifest, weights):
        file.write_text("1")
        first = of(file.parent)
        assert first == of(
            file.parent,
            "b",
            out_dir="elsewhere",
            telemetry=dict(progress=True),
            data=dict(num_workers=3),
        )
        assert first != of(file.parent, seed=1)
        assert first != of(file.parent, mc=dict(lens_temperature=0.7))
        file.write_text("12")
        assert first != of(file.parent), "other weights"


# Running


def test_everything_runs_once_and_a_second_call_has_nothing_to_do(bench: Bench) -> None:
    assert bench.call("--jobs", "2") == 0
    assert len(bench.noted("train")) == 3, "five rows, three trainings"
    assert sorted(entry[2] or "" for entry in bench.noted("evaluate")) == ["", "", "", "off"]
    journal, table = bench.journal.read_text(), bench.table("first")
    assert bench.call("--jobs", "2") == 0
    assert (bench.journal.read_text(), bench.table("first")) == (journal, table)
    bench.plan(PLAN.replace("memory: false", "iterations: 1"))
    assert bench.call() == 0
    assert (len(bench.noted("train")), len(bench.noted("evaluate"))) == (
        3,
        5,
    ), "what is trained is evaluated"


def test_a_trial_without_its_checkpoint_is_trained_again_for_a_new_evaluation(bench: Bench) -> None:
    for _ in range(2):
        assert bench.call("--only", "first", "--remove_checkpoints") == 0
        assert not [*bench.out.glob("*/checkpoints")]
        assert len(bench.noted("train")) == 2
    bench.plan(PLAN.replace("samples: 6", "samples: 7"))
    assert bench.call("--only", "first") == 0
    assert len(bench.noted("train")) == 4


def test_a_table_has_the_means_their_spread_and_what_went_wrong(bench: Bench) -> None:
    bench.plan(PLAN.replace("temperature: 2.0", "temperature: 9.0"))
    assert bench.call("--seeds", "0,1", "--jobs", "2") == 1
    first = bench.table("first")
    assert first.startswith("### Does it matter?\n\nGroup `first`: `")
    assert "random initial weights; seeds 0, 1." in first
    assert re.search(
        r"^\* `python tools/ablate.py --plan .*--jobs 2`: .*; 2 at a time\.$", first, re.M
    )
    figures = (
        r"\| 80 \| 0\.\d\d M \| \d+ \| 18\.500 \| -0\.500 \| – \| 0\.500 \| 0\.500 ± 0\.000 /"
        r" 1\.000 ± 0\.000 \|"
    )
    assert re.search(rf"^\| default {figures}", first, re.M), first
    assert re.search(r"^\| forgetful .* 0\.500 ± 0\.000 / 0\.250 ± 0\.000 \|$", first, re.M)
    assert "| hot (error: it cannot \\| work) |" in first
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in first.splitlines() if line[:1] == "|"}
    assert len(widths) == 1
    begun = len(bench.noted("train"))
    assert bench.call("--only", "first") == 1
    assert len(bench.noted("train")) == begun + 1, (
        "failed ones are tried again, finished ones are not"
    )


def test_what_hangs_is_ended(bench: Bench) -> None:
    bench.plan(PLAN.replace("{steps: 2}", "{settings: {mc.lens_temperature: 8.0}}"))
    assert bench.call("--only", "second", "--timeout_s", "3") == 1
    assert "| long (error: exceeded 3 s (--timeout_s)) |" in bench.table("second")
    assert not [entry for entry in bench.noted("train") if alive(entry[3])]


def test_an_evaluation_that_fails_is_tried_again_without_training(bench: Bench) -> None:
    program = bench.folder / "launch" / "evaluate.py"
    good = program.read_text()
    program.write_text("print('error: no such policy')\nraise SystemExit(2)")
    assert bench.call("--only", "second") == 1
    assert "| default (error: no such policy) |" in bench.table("second")
    program.write_text(good)
    assert bench.call("--only", "second") == 0
    assert len(bench.noted("train")) == 2


def test_jobs_run_side_by_side_each_gpu_in_turn(bench: Bench) -> None:
    """No training ends before all four have begun: fewer at a time would be over time."""
    bench.pretend(barrier=4)
    options = ["--jobs", "4", "--gpus", "0,1", "--seeds", "0,1", "--only", "second"]
    assert bench.call(*options) == 0
    assert sorted(entry[2] for entry in bench.noted("train")) == ["0", "0", "1", "1"]


def test_what_is_stopped_is_no_result_and_the_next_call_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop when the second training has begun, which never ends by itself."""
    bench.plan(PLAN.replace("{steps: 2}", "{settings: {mc.lens_temperature: 8.0}}"))

    def ask() -> None:
        while len(bench.noted("train")) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    assert bench.call("--only", "second") == 1
    assert not [entry for entry in bench.noted("train") if alive(entry[3])]
    assert "| long (error: stopped) |" in bench.table("second")
    bench.plan(PLAN)
    assert bench.call("--only", "second") == 0
    assert len(bench.noted("train")) == 3


def test_nothing_begins_when_time_is_up_and_listing_runs_nothing(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.call("--time_limit_s", "0") == 1
    assert "| default (not run) |" in bench.table("first")
    assert bench.call("--only", "second", "--list") == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert ["1 of 1 evaluations missing" in line for line in lines] == [True, True]
    assert not bench.journal.exists()


def test_a_run_keeps_its_settings_and_reports_to_its_record_alone(bench: Bench) -> None:
    assert bench.call("--only", "first", "--mc.lens_lr=0.125") == 0
    configs = [yaml.safe_load(path.read_text()) for path in bench.out.glob("*.yaml")]
    assert sorted(config["mc"]["lens_temperature"] for config in configs) == [0.5, 2.0]
    for config in configs:
        assert config["mc"]["lens_lr"] == 0.125
        assert (config["out_dir"], config["resume"]) == (str(bench.out), "never")
        assert not config["telemetry"]["wandb"]
        assert not config["telemetry"]["progress"]


def test_processes_that_ignore_a_request_are_ended_with_their_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ablation.commands.GRACE_S", 0.3)
    script = tmp_path / "stubborn.py"
    script.write_text(
        textwrap.dedent("""
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(2000)"])
        print(child.pid, flush=True)
        time.sleep(2000)
        """)
    )
    log = tmp_path / "log"

    class WhenTheChildRuns(Stop):
        def __bool__(self) -> bool:
            return log.read_text().endswith("\n")

    command = [sys.executable, str(script)]
    assert not run_command(
        command, log=log, environ={}, timeout_s=TIMEOUT_S, stop=WhenTheChildRuns()
    )
    child = int(log.read_text().split()[0])
    deadline = time.monotonic() + TIMEOUT_S
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


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
    assert training_metrics(tmp_path) == {"lens loss": 9.5, "corr": -9.0}
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
    assert re.fullmatch(
        r"`python tools/ablate.py`: .*\d+ CPU cores; Python 3.*, torch .*, DeepSpeed .*, mc_ds .*; "
        r"commit: ([0-9a-f]{7,}( with changes)?|unknown); \d{4}-\d\d-\d\d; 3 at a time\.",
        made,
    )


# With the programs themselves


@pytest.mark.slow
def test_a_grid_on_a_real_backbone(tmp_path: Path) -> None:
    """Trains a backbone, then LensNets alone on it, by the real commands; a second call is
    stopped by a signal and goes on.
    """
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
    environ = inherited(**ONLY_CPU)  # the whole library: keys need a vocabulary
    trained = run([sys.executable, "launch/train.py", "--config", recipe], environ)
    assert trained.returncode == 0, trained.stderr[-3000:]
    files = {"--plan": "plan.yaml", "--out": "out"}
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
        if line.startswith("started"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(TIMEOUT_S) == 1
    done = run(command, environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tables = {path.stem: path.read_text() for path in (tmp_path / "out" / "tables").iterdir()}
    assert tables.keys() == {"index", "memory"}
    for table in tables.values():
        head, _, *rows = [line.split(" | ") for line in table.splitlines() if line[:1] == "|"]
        assert head[-5:] == ["lens", "blind", "other_question", "random", "recency |"]
        assert [row[0] for row in rows] == ["| with", "| without"]
        assert all(
            re.fullmatch(r"\d\.\d{3} / \d\.\d{3}( \|)?", cell) for row in rows for cell in row[-5:]
        )
        assert all("–" not in row for row in rows)
    sizes = [line.split(" | ")[2] for line in tables["index"].splitlines() if line[:3] == "| w"]
    assert sizes[0] > sizes[1]
