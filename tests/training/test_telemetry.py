"""Telemetry: the record's one line per step, a mirror that cannot fail a run, the bar, and lines
for the eye.
"""

import json
import math
import sys
import types
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mc_ds.config import RunConfig
from mc_ds.drawing import LEGEND, lens_debug_lines, lod_ascii, lod_ascii_lines, span_marks
from mc_ds.training.telemetry import MetricsWriter, ProgressBar, WandbMirror
from mc_ds.training.telemetry.wandb_mirror import wandb_mode


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
        with pytest.raises(ValueError, match="step = 3 already has its record"):
            writer.write(3, {})


def test_other_ranks_write_nothing(tmp_path, capfd):
    with closing(MetricsWriter(tmp_path / "m.jsonl", enabled=False)) as writer:
        writer.write(0, {"a": 1})
    WandbMirror(RunConfig(), tmp_path, enabled=False).write(0, {"a": 1})
    bar = ProgressBar(3, enabled=False)
    bar.update({"train/loss": 1.0})
    bar.close()
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


def test_metrics_are_mirrored_with_their_step(fake_wandb, tmp_path):
    mirror = WandbMirror(RunConfig(name="mine"), tmp_path)
    mirror.write(4, {"train/loss": 1.5, "val/loss": None})
    mirror.close()
    start = fake_wandb.starts[0]
    assert (start["mode"], start["name"], start["dir"]) == ("offline", "mine", str(tmp_path))
    assert fake_wandb.run.logged == [{"step": 4, "train/loss": 1.5}]
    assert fake_wandb.run.finished == 0


def test_a_resumed_run_keeps_its_id_and_a_fresh_one_gets_another(fake_wandb, tmp_path):
    for start_step in (0, 50, 0):
        WandbMirror(RunConfig(), tmp_path, start_step=start_step).close()
    first, resumed, fresh = (start["id"] for start in fake_wandb.starts)
    assert first == resumed != fresh


@pytest.mark.parametrize("config", [{"telemetry": {"wandb": False}}, {}])
def test_it_can_be_switched_off_without_importing_it(monkeypatch, tmp_path, config):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise, and warn
    monkeypatch.setenv("WANDB_MODE", "online" if config else "disabled")
    assert WandbMirror(RunConfig.model_validate(config), tmp_path)._run is None


@pytest.mark.filterwarnings("error")
def test_a_failure_is_one_warning_and_ends_the_mirror(fake_wandb, tmp_path):
    mirror = WandbMirror(RunConfig(), tmp_path)
    with pytest.warns(UserWarning, match=r"off from here \(OSError: disk full\)"):
        mirror.write(0, {"fail": 1})
    mirror.write(1, {"fail": 1})
    mirror.close()
    assert mirror._run is None


@pytest.mark.parametrize("mode", ["offline", "nonsense"])
def test_a_start_that_fails_is_one_warning(monkeypatch, tmp_path, mode):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.warns(UserWarning, match="mirror is off") as caught:
        mirror = WandbMirror(RunConfig(), tmp_path)
    mirror.write(0, {"a": 1})
    mirror.close()
    assert len(caught) == 1


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


# The bar


def test_the_bar_shows_key_figures_and_keeps_the_last_validation(capfd):
    bar = ProgressBar(10, start_step=4)
    bar.update(
        {
            "train/loss": 2.0,
            "val/loss": 3.25,
            "train/tokens_per_s": 12345.6,
            "mc/preference_corr_mean": -0.5,
        }
    )
    bar.update({"train/loss": 1.5, "val/loss": None, "mc/preference_corr_mean": math.nan})
    bar.close()
    last = capfd.readouterr().err.split("\r")[-1]
    assert "6/10" in last
    assert "loss=1.500 val=3.250 tok/s=12,346 corr=-0.50" in last


def test_lines_are_printed_whether_or_not_a_bar_is_drawn(capfd):
    for enabled in (True, False):
        bar = ProgressBar(10, enabled=enabled)
        bar.print("text")
        bar.close()
        assert "text\n" in capfd.readouterr().err


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


def test_rows_are_labelled():
    lods, starts = np.zeros((2, 8), dtype=int), np.arange(8)[None].repeat(2, axis=0)
    assert lod_ascii_lines(lods, starts, block_size=4, seq_len=8) == [
        LEGEND,
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
