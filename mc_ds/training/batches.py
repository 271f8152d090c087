"""Makes the micro-batches that a rank trains on."""

from collections.abc import Iterator

import torch

from mc_ds.config import RunConfig
from mc_ds.data import (
    Batch,
    LoadedBatches,
    MicroBatchDataset,
    MicroStep,
    SampleSource,
    make_loader,
)
from mc_ds.training.curriculum import Curriculum
from mc_ds.training.ranks.debug import cross_checked
from mc_ds.training.ranks.distributed import RankEnvironment


class RankBatches:
    """Micro-batches of one rank: a pure function of seed, step, rank and curriculum stage."""

    def __init__(
        self,
        source: SampleSource,
        config: RunConfig,
        env: RankEnvironment,
        curriculum: Curriculum,
        accumulation: int,
        device: torch.device,
    ) -> None:
        self._source, self._config, self._env = source, config, env
        self._curriculum, self._accumulation, self._device = curriculum, accumulation, device
        self._loaded: LoadedBatches | None = None

    @property
    def failure(self) -> str | None:
        """The error of the loader processes; None if they work."""
        return None if self._loaded is None else self._loaded.failure

    def load(self, steps: range) -> Iterator[Batch]:
        """Return an iterator over the micro-batches of `steps`, made by loader processes. With
        `debug` they are compared between ranks.
        """
        self._loaded = batches = make_loader(
            self._dataset(self._env.rank),
            self._micro_steps(steps),
            num_workers=self._config.data.num_workers,
            pin_memory=self._device.type == "cuda",
        )
        if not self._config.debug:
            return batches
        neighbour = self._dataset((self._env.rank + 1) % self._env.world_size)
        return cross_checked(batches, neighbour, self._device)

    def of(self, step: int) -> Iterator[Batch]:
        """Yield the micro-batches of one step, made in this process."""
        dataset = self._dataset(self._env.rank)
        return (dataset[micro_step] for micro_step in self._micro_steps(range(step, step + 1)))

    def _micro_steps(self, steps: range) -> Iterator[MicroStep]:
        """Yield every micro-step of `steps`, in order."""
        mc, stage_at = self._config.mc, self._curriculum.stage_at
        return (
            MicroStep(step, micro, mc.wc_length_at(step), stage_at(step))
            for step in steps
            for micro in range(self._accumulation)
        )

    def _dataset(self, rank: int) -> MicroBatchDataset:
        """Return the dataset of `rank`'s micro-batches."""
        return MicroBatchDataset(
            self._source,
            self._config.mc,
            seed=self._config.seed,
            micro_batch_size=self._config.train.micro_batch_size,
            rank=rank,
            world_size=self._env.world_size,
            accumulation_steps=self._accumulation,
        )
