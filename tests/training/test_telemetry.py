"""Telemetry: the record's one line per step, a mirror that cannot fail a run, the bar, and lines
for the eye.
"""

import json
import math
import os
import re
import subprocess
import sys
import types
from contextlib import closing
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mc_ds.config import RunConfig
from mc_ds.drawing import legend, lens_debug_lines, lod_ascii, lod_ascii_lines, span_marks
from mc_ds.training.planning.hardware import HARDWARE
from mc_ds.training.planning.plan import best_plan
from mc_ds.training.planning.work import parameter_counts
from mc_ds.training.telemetry import MetricsWriter, Screen, open_mirrors
from mc_ds.training.telemetry.banner import Facts, Place, banner, devices
from mc_ds.training.telemetry.progress import Progress, duration
from mc_ds.training.telemetry.source import source_commit
from mc_ds.training.telemetry.wandb_sink import wandb_mode
from tests.support.optional import optional
from tests.support.processes import inherited
from tests.support.tiny_run import TIMEOUT_S


def records(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# metrics.jsonl


def test_a_record_is_on_disk_when_write_returns(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(0, {"train/loss": 2.5, "mc/lensnet_calls": 1})
    assert records(path) == [{"step": 0, "train/loss": 2.5, "mc/lensnet_calls": 1}]
    writer.close()


@pytest.mark.parametrize("fault", ["moved", "removed", "replaced"])
def test_a_record_that_lost_its_name_is_noticed(tmp_path, fault):
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsWriter(path)) as writer:
        writer.write(0, {"loss": 1})
        path.unlink() if fault == "removed" else path.rename(tmp_path / "other")
        if fault == "replaced":
            path.write_text("")
        with pytest.raises(OSError, match="it was moved or removed while the run wrote to it"):
            writer.write(1, {"loss": 2})


def test_a_record_is_flushed_before_a_checkpoint_may_be(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_size))
    with closing(MetricsWriter(tmp_path / "metrics.jsonl")) as writer:
        writer.write(0, {"loss": 1})
        writer.sync()
    assert flushed == [(tmp_path / "metrics.jsonl").stat().st_size]


def test_values_are_strict_json(tmp_path):
    values = {
        "nan": math.nan,
        "inf": -math.inf,
        "np": np.float32(0.5),
        "int": np.int64(3),
        "torch": torch.tensor(0.25),
        "none": None,
    }
    with closing(MetricsWriter(tmp_path / "m.jsonl")) as writer:
        writer.write(7, {**values, "step": 1})
    expected = {
        "step": 7,
        "nan": None,
        "inf": None,
        "np": 0.5,
        "int": 3,
        "torch": 0.25,
        "none": None,
    }
    assert records(tmp_path / "m.jsonl") == [expected]


@given(
    done=st.integers(0, 12),
    resumed=st.integers(0, 12),
    total=st.integers(12, 15),
    torn=st.booleans(),
)
def test_a_resumed_run_leaves_one_record_per_step(tmp_path_factory, done, resumed, total, torn):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with closing(MetricsWriter(path)) as writer:
        for step in range(done):
            writer.write(step, {"run": 1})
    if torn:
        with path.open("a") as file:
            file.write('{"step": 0, "ru')
    start = min(resumed, done)
    with closing(MetricsWriter(path, start_step=start)) as writer:
        for step in range(start, total):
            writer.write(step, {"run": 2})
    assert records(path) == [
        {"step": step, "run": 1 if step < start else 2} for step in range(total)
    ]


def test_a_step_has_one_record(tmp_path):
    with closing(MetricsWriter(tmp_path / "m.jsonl", start_step=3)) as writer:
        writer.write(3, {})
        with pytest.raises(ValueError, match="step = 3 already has a record"):
            writer.write(3, {})


def test_other_ranks_write_nothing(tmp_path, capfd):
    with closing(MetricsWriter(tmp_path / "m.jsonl", enabled=False)) as writer:
        writer.write(0, {"a": 1})
    screen = Screen(tmp_path, 1, enabled=False)
    screen.print(["text"])
    screen.update({"train/loss": 1.0})
    screen.log(["text"])
    screen.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# Weights & Biases


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], None

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values):
        if "fail" in values:
            raise OSError("disk\nfull")
        self.logged.append(values)

    def finish(self, exit_code):
        self.finished = exit_code


@pytest.fixture
def fake_wandb(monkeypatch, tmp_path):
    """A stand-in for the library that records how it was started; no key anywhere."""
    module = types.ModuleType("wandb")
    module.starts, module.run = [], FakeRun()
    module.Settings = lambda **kwargs: kwargs
    module.init = lambda **kwargs: module.starts.append(kwargs) or module.run
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    return module


def mirror_of(folder, *, start_step=0, **telemetry):
    """The only mirror of a run with these settings."""
    config = RunConfig.model_validate({"name": "mine", "telemetry": telemetry})
    (mirror,) = open_mirrors(config, folder, {"commit": "abc"}, start_step=start_step)
    return mirror


def test_metrics_are_mirrored_with_their_step(fake_wandb, tmp_path):
    mirror = mirror_of(tmp_path, wandb_group="seeds")
    mirror.write(4, {"train/loss": 1.5, "val/loss": None})
    mirror.close(tmp_path)
    start = fake_wandb.starts[0]
    assert (start["mode"], start["name"], start["dir"]) == ("offline", "mine", str(tmp_path))
    assert (start["group"], start["config"]["commit"]) == ("seeds", "abc")
    assert start["config"]["mc"]["seq_len"] == 4096
    assert fake_wandb.run.logged == [{"step": 4, "train/loss": 1.5}]
    assert fake_wandb.run.finished == 0


def test_report_and_pictures_that_exist_become_media(fake_wandb, tmp_path):
    fake_wandb.Html, fake_wandb.Image = (
        (lambda path: f"page {path}"),
        (lambda path: f"image {path}"),
    )
    (tmp_path / "figures").mkdir()
    for name in ("report.html", "figures/focus.png", "notes.txt"):
        (tmp_path / name).write_text("")
    mirror_of(tmp_path).close(tmp_path, exit_code=3)
    assert fake_wandb.run.logged == [
        {"media/focus": f"image {tmp_path}/figures/focus.png"},
        {"media/report": f"page {tmp_path}/report.html"},
    ]
    assert fake_wandb.run.finished == 3


def test_a_resumed_run_keeps_its_id_and_a_fresh_one_gets_another(fake_wandb, tmp_path):
    for start_step in (0, 50, 0):
        mirror_of(tmp_path, start_step=start_step).close(tmp_path)
    first, resumed, fresh = (start["id"] for start in fake_wandb.starts)
    assert first == resumed != fresh
    assert {start["resume"] for start in fake_wandb.starts} == {"allow"}


def test_it_can_be_switched_off_without_importing_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise, and warn
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mirror_of(tmp_path).sink is None
    off = RunConfig.model_validate({"telemetry": {"wandb": False}})
    assert open_mirrors(off, tmp_path, {}) == []


@pytest.mark.filterwarnings("error")
def test_a_failure_is_one_warning_and_ends_the_mirror(fake_wandb, tmp_path):
    mirror = mirror_of(tmp_path)
    with pytest.warns(UserWarning, match=r"off from now on \(OSError: disk full\)"):
        mirror.write(0, {"fail": 1})
    mirror.write(1, {"fail": 1})
    mirror.close(tmp_path)
    assert mirror.sink is None


@pytest.mark.parametrize("mode", ["offline", "nonsense"])
def test_a_start_that_fails_is_one_warning(monkeypatch, tmp_path, mode):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.warns(UserWarning, match="mirror failed and is off") as caught:
        mirror = mirror_of(tmp_path)
    mirror.write(0, {"a": 1})
    mirror.close(tmp_path)
    assert len(caught) == 1


def test_tensorboard_has_the_curves_of_a_resumed_run_once_and_its_pictures(tmp_path):
    reader = optional("tensorboard.backend.event_processing.event_accumulator")
    for start, losses in ((0, {1: 3.0, 2: 2.0, 3: 9.0}), (2, {3: 1.0})):
        mirror = mirror_of(tmp_path, wandb=False, tensorboard=True, start_step=start)
        for step, loss in losses.items():
            mirror.write(step, {"train/loss": loss, "a/text": "x\ny", "val/loss": None})
        if start:
            plt.imsave(tmp_path / "focus.png", np.zeros((2, 3)))
        mirror.close(tmp_path)
    found = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [
        (1, 3.0),
        (2, 2.0),
        (3, 1.0),
    ]
    assert found.Tags()["scalars"] == ["train/loss"]
    (text,) = found.Tensors("a/text/text_summary")[-1].tensor_proto.string_val
    assert text == b"    x\n    y", "as code"
    assert [event.step for event in found.Images("focus")] == [3]


def test_without_tensorboard_the_warning_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(
        UserWarning, match=r"TensorBoard mirror .*pip install 'mc_ds\[tensorboard\]'"
    ):
        mirror = mirror_of(tmp_path, wandb=False, tensorboard=True)
    assert mirror.sink is None


def test_it_goes_online_only_with_a_key(tmp_path):
    nowhere = {"NETRC": str(tmp_path / "none")}
    assert wandb_mode(nowhere) == "offline"
    assert (
        wandb_mode({**nowhere, "WANDB_MODE": "online"}) == "offline"
    )  # online without a key would prompt
    assert wandb_mode({**nowhere, "WANDB_API_KEY": "k"}) == "online"
    assert wandb_mode({**nowhere, "WANDB_API_KEY": "k", "WANDB_MODE": "offline"}) == "offline"
    assert wandb_mode({**nowhere, "WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}) == "disabled"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_mode({"NETRC": str(tmp_path / "netrc")}) == "online"
    assert (
        wandb_mode({"NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "https://own.example"})
        == "offline"
    )


# The screen


def test_figures_keep_their_last_value():
    progress = Progress(10, start_step=4)
    progress.update(
        {
            "train/loss": 2.0,
            "val/loss": 3.25,
            "train/tokens_per_s": 12345.6,
            "mc/preference_corr_mean": -0.5,
            "train/peak_memory_gb": 0.0,
            "data/epoch/corpus": 0.5,
            "data/epoch/recall": 1.25,
        }
    )
    progress.update({"train/loss": 1.5, "val/loss": None, "mc/preference_corr_mean": math.nan})
    assert progress.line().startswith(
        "step 6/10 (60%)  loss 1.500  val 3.250  corr -0.50  tok/s 12,346  epoch 1.25"
    )


def test_the_time_left_follows_the_pace_after_the_first_step():
    now = iter([0.0, 60.0, 62.0, 64.0])  # a minute of compiling, then two seconds a step
    progress = Progress(103, clock=lambda: next(now))
    progress.update({})
    assert progress.left_s is None
    progress.update({})
    assert progress.left_s == 2 * 101
    progress.update({})
    assert progress.line() == "step 3/103 (3%)  left 3 min 20 s"
    assert progress.elapsed_s == 64


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_spans_of_time(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("shows_progress", [True, False])
def test_without_a_terminal_progress_is_whole_lines_and_the_log_has_all(
    tmp_path, capfd, shows_progress
):
    screen = Screen(tmp_path, 3, shows_progress=shows_progress)
    screen.print(["first", "second"])
    for loss in (3.0, 2.0, 1.0):
        screen.update({"train/loss": loss})
    screen.log(["for the log alone"])
    screen.close()
    said = capfd.readouterr().err
    assert said.startswith("first\nsecond\n")
    assert ("step 3/3 (100%)  loss 1.000  left 0 s\n" in said) == shows_progress
    assert "\r" not in said
    assert "alone" not in said
    log = (tmp_path / "train.log").read_text()
    assert re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  .*\n)+", log)
    assert "step 3/3 (100%)  loss 1.000  left 0 s\n" in log
    assert "  for the log alone\n" in log
    assert log.endswith("  done: step 3, 0 s of training\n")


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capfd):
    (tmp_path / "train.log").mkdir()
    screen = Screen(tmp_path, 9)
    screen.print(["a"])
    screen.print(["b"])
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "a"
    assert re.fullmatch(
        r"warning: cannot write .*train\.log \(.*\): the run continues without it", said[1]
    )
    assert said[2:] == ["b"]


def test_in_a_terminal_a_view_is_drawn_below_what_is_said(tmp_path):
    """In a process of its own, whose stderr is a terminal."""
    source = f"""
import sys
from pathlib import Path
from mc_ds.training.telemetry import Screen
screen = Screen(Path({str(tmp_path)!r}), 2)
screen.print(["[begins] at /a/path"])
screen.update({{"train/loss": 2.0}})
print("from elsewhere")
screen.progress.saved = 1
screen.update({{"train/loss": 1.5}})
screen.close()
print("after it", file=sys.stderr)
"""
    main, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=terminal,
        stderr=terminal,
        env=inherited(TERM="xterm", COLUMNS="100"),
    )
    os.close(terminal)
    drawn = b""
    try:
        while chunk := os.read(main, 4096):
            drawn += chunk
    except OSError:  # the end of a terminal
        pass
    assert process.wait(TIMEOUT_S) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    assert text.startswith("[begins] at /a/path\r\n")
    assert "from elsewhere\r\n" in text
    last = text[text.rindex("step 2/2") :]
    assert "loss 1.500  checkpoint step 1" in last
    assert last.endswith("after it\r\n")
    assert drawn.rindex(b"\x1b[?25h") > drawn.rindex(b"\x1b[?25l")  # the cursor is back
    assert "step 2/2 (100%)  loss 1.500" in (tmp_path / "train.log").read_text()


def test_the_banner_counts_devices_and_hosts():
    places = [Place(host, "NVIDIA H200") for host in ("a", "a", "b", "b")]
    assert devices(places) == "4 ranks: 4 x NVIDIA H200 on 2 hosts (a to b)"
    assert devices(places[:1]) == "1 rank: 1 x NVIDIA H200 on a"
    mixed = [Place("a", "NVIDIA H200"), Place("a", "NVIDIA H100")]
    assert devices(mixed) == "2 ranks: 1 x NVIDIA H200, 1 x NVIDIA H100 on a"


@pytest.mark.parametrize(
    ("devices", "precision", "said"),
    [
        (["NVIDIA H200"] * 8, "bf16", r"at least about (\d+) h \d+ min;"),
        (["NVIDIA H200"] * 8, "fp32", "the time left begin after the second step"),
        (["NVIDIA H200", "NVIDIA B200"] * 4, "bf16", "the time left begin after the second step"),
        (["CPU (2 threads)"] * 8, "fp32", "the time left begin after the second step"),
    ],
)
def test_the_banner_says_how_long_it_takes_where_the_planner_knows(devices, precision, said):
    train = {"total_steps": 20_000, "global_batch_size": 64}
    config = RunConfig.model_validate({"backbone": {"preset": "1b"}, "train": train})
    facts = Facts(
        folder=Path("runs/run"),
        places=[Place("a", device) for device in devices],
        zero_stage=3,
        precision=precision,
        versions={"torch": "2.13"},
        commit=None,
        parameters=parameter_counts(config),
        corpus="text",
        tokens=(10, 1),
        epochs={"corpus": 1.0},
        start=["begins at step 0"],
    )
    lines = banner(config, facts)
    assert len(lines) <= 10
    match = re.search(said, lines[-2])
    assert match, lines[-2]
    if match.groups():
        planned = best_plan(config, parameter_counts(config), HARDWARE["h200"], 8)
        hours = 20_000 * planned.time.total / 3600
        assert hours <= int(match[1]) + 1 < 3 * hours, "no faster than the best plan"


def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    package = tmp_path / "mc_ds" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr("mc_ds.__file__", str(package))

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    assert source_commit() is None  # no repository
    git("init")
    assert source_commit() is None  # one that the package is no part of
    git("add", ".")
    git("commit", "-m", "first")
    assert re.fullmatch(r"[0-9a-f]{12}", source_commit())
    package.write_text("changed = 1\n")
    assert re.fullmatch(r"[0-9a-f]{12}-dirty", source_commit())


# Lines of text


def plan(*entries):
    return np.array([lod for lod, _ in entries]), np.array([start for _, start in entries])


def test_one_symbol_per_block():
    # K = 4, T = 32: an LOD2 span of 16 tokens, an LOD1 block, two blocks of tokens, an LOD1 block
    entries = [(2, 0), (1, 16), *((0, token) for token in range(20, 28)), (1, 28)]
    assert lod_ascii(*plan(*entries), block_size=4, seq_len=32) == "░░░░▒██▒"


def test_a_recency_window_is_blank_before_its_first_token():
    entries = [
        (0, token) for token in range(10, 32)
    ]  # begins in the middle of a block: half covered is shown as covered
    assert lod_ascii(*plan(*entries), block_size=4, seq_len=32) == "  ██████"
    assert lod_ascii(*plan(*entries[2:]), block_size=4, seq_len=32) == "   █████"


def test_long_sequences_share_symbols_by_majority():
    entries = [(1, 0), (1, 4), (1, 8), *((0, token) for token in range(12, 32))]
    assert lod_ascii(*plan(*entries), block_size=4, seq_len=32, width=3) == "▒██"
    assert lod_ascii(*plan(*entries), block_size=4, seq_len=32, width=4) == "▒███"


def test_three_levels_and_a_tail_that_is_no_whole_block():
    entries = [(3, 0), (0, 8), (0, 9), (0, 10)]
    assert lod_ascii(*plan(*entries), block_size=2, seq_len=11) == "····██"


def test_the_legend_names_the_levels_that_there_are():
    assert legend(1) == "█ LOD0  ▒ LOD1  (blank: not covered)"
    assert legend(3) == "█ LOD0  ▒ LOD1  ░ LOD2  · LOD3  (blank: not covered)"


def test_rows_are_labelled():
    lods, starts = np.zeros((2, 8), dtype=int), np.arange(8)[None].repeat(2, axis=0)
    assert lod_ascii_lines(lods, starts, block_size=4, seq_len=8) == [
        "█ LOD0  (blank: not covered)",
        "  baseline |██|",
        " variant 1 |██|",
    ]


def test_lens_debug_lines_hold_each_rows_statistics():
    lines = lens_debug_lines(np.array([[0.0, 0.0], [-0.5, 0.25]]), np.array([2.0, 1.5]), -0.75)
    assert len(lines) == 4
    assert lines[2].split() == [
        "variant",
        "1",
        "1.5000",
        "-0.5000",
        "-0.1250",
        "0.3750",
        "-0.5000",
        "+0.2500",
    ]
    assert lines[3] == "preference_corr -0.750"
    assert (
        lens_debug_lines(np.zeros((1, 2)), np.zeros(1), None)[-1]
        == "preference_corr none: no variance"
    )


def test_span_marks_stand_under_the_symbols_that_hold_them() -> None:
    spans = np.array([[0, 1], [15, 17], [60, 64]])
    assert span_marks(spans, 8, 64, "^") == "^^^    ^"
    assert span_marks(spans, 8, 64, "^", width=4) == "^^ ^"
    assert len(span_marks(spans, 8, 70, "^")) == len(
        lod_ascii(np.zeros(70, np.int64), np.arange(70), 8, 70)
    )
