"""Rates of a step: against the work written out by hand, and against the peak of known GPUs
alone.
"""

import pytest
import torch

from mc_ds.config import RunConfig
from mc_ds.training.planning.hardware import of_device
from mc_ds.training.planning.work import work_per_micro_step
from mc_ds.training.telemetry.throughput import Throughput


def config(**train: object) -> RunConfig:
    return RunConfig.model_validate(
        dict(
            mc=dict(
                seq_len=512,
                block_size=8,
                train_wc_length=288,
                recent_tokens=64,
                wc_schedule=[
                    dict(start_step=0, train_wc_length=512),
                    dict(start_step=5, train_wc_length=288),
                ],
            ),
            train=dict(global_batch_size=12, micro_batch_size=2, **train),
        )
    )


def test_operations_are_those_of_one_ranks_micro_steps_at_the_present_length() -> None:
    run, cpu = config(), torch.device("cpu")
    throughput = Throughput(run, 3, cpu)
    for length, rows in ((288, 5), (512, 1)):
        rates = throughput.metrics(length, 2.0)
        assert rates["train/tflops"] == 3 * work_per_micro_step(run, length).model / 2.0 / 1e12
        assert rates["train/tokens_per_s"] == 12 * 512 / 2
        assert rates["train/entries_per_s"] == 12 * rows * length / 2
        assert rates["train/step_ms"] == 2000
        assert "train/mfu" not in rates


def on_gpu(monkeypatch: pytest.MonkeyPatch, name: str, run: RunConfig) -> dict[str, float]:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    return Throughput(run, 1, torch.device("cuda", 0)).metrics(288, 1.0)


def test_mfu_is_the_share_of_a_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in (("NVIDIA H200", 989.0), ("NVIDIA A100-SXM4-80GB", 312.0)):
        rates = on_gpu(monkeypatch, name, config())
        assert rates["train/mfu"] == rates["train/tflops"] / peak


def test_nothing_is_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for boards whose peak is another, nor for another precision, nor for frozen parts."""
    assert "train/mfu" not in on_gpu(monkeypatch, "NVIDIA H100 PCIe", config())
    assert "train/mfu" not in on_gpu(monkeypatch, "NVIDIA H200", config(precision="fp32"))
    frozen = config()
    frozen = frozen.model_copy(update={"train": frozen.train.model_copy(update={"frozen": "all"})})
    assert not {"train/mfu", "train/tflops"} & on_gpu(monkeypatch, "NVIDIA H200", frozen).keys()
    assert of_device("NVIDIA GeForce RTX 4090") is None
