"""Throughput of a run: tokens, entries and operations per second, and MFU."""

import torch

from mc_ds.config import RunConfig
from mc_ds.training.planning.hardware import of_device
from mc_ds.training.planning.work import work_per_micro_step


class Throughput:
    """Computes the rates of optimizer steps with `accumulation` micro-steps.

    Operations are those of backbone and GistNet on one rank (mc_ds/training/planning/work.py), not
    reported if any part is frozen. MFU is reported only in bf16 on GPUs with known peak.
    """

    def __init__(self, config: RunConfig, accumulation: int, device: torch.device) -> None:
        self._config = config
        self._operations: dict[int, float] = {}
        """Operations of a step on one rank, by `wc_length`."""
        if config.train.frozen == "none":
            self._operations = {
                length: accumulation * work_per_micro_step(config, length).model
                for length in config.mc.wc_lengths
            }
        on_gpu = device.type == "cuda" and config.train.precision_on("cuda") == "bf16"
        hardware = of_device(torch.cuda.get_device_name(device)) if on_gpu else None
        self.peak_tflops = None if hardware is None else hardware.peak_tflops

    def metrics(self, wc_length: int, seconds: float) -> dict[str, float]:
        """Return the rates of a step at W = `wc_length` that took `seconds`."""
        mc, sequences = self._config.mc, self._config.train.global_batch_size
        rates = {
            "train/tokens_per_s": sequences * mc.seq_len / seconds,
            "train/entries_per_s": sequences * mc.rows_at(wc_length) * wc_length / seconds,
            "train/step_ms": 1e3 * seconds,
        }
        if wc_length in self._operations:
            rates["train/tflops"] = tflops = self._operations[wc_length] / seconds / 1e12
            if self.peak_tflops is not None:
                rates["train/mfu"] = tflops / self.peak_tflops
        return rates
