"""The types passed from data to training: samples, micro-steps and micro-batches.

Legend: B sequences, T tokens, G rows per sequence, R = B*G rows, W entries, h horizon entries.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Sample(NamedTuple):
    """One sequence."""

    tokens: NDArray[np.int64]
    """[T + 1] token ids; the last is only a label."""
    horizon_mask: NDArray[np.float32]
    """[h] weights of the horizon's targets in the row score; all ones by default."""


class SampleSource(Protocol):
    """Anything that makes sequences. Must pickle, because loader processes hold copies."""

    def sample(self, index: int, stage: int) -> Sample:
        """Return sequence `index` >= 0 of curriculum stage `stage`.

        Must be a pure function of both and of the seed given at construction.
        """
        ...


class TrainingSource(SampleSource, Protocol):
    """A source that can tell how often it reads its text."""

    def epochs(self, samples: int) -> dict[str, float]:
        """Return, for each named part of the text, how often the first `samples` sequences
        read it.
        """
        ...


class MicroStep(NamedTuple):
    """Identifies a micro-step: all that a loader process needs to make its micro-batch.

    Made in the training process, so that loader processes have no state.
    """

    step: int
    """Global optimizer step."""
    micro: int
    """Micro-step within the step, 0 .. accumulation steps - 1."""
    wc_length: int
    """Entries W of its working contexts."""
    stage: int
    """Stage of the data curriculum."""


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch. Rows of a sequence are adjacent, its baseline first."""

    tokens: Tensor
    """[B, T + 1] int64."""
    lods: Tensor
    """[R, W] int64, level of detail of each entry."""
    starts: Tensor
    """[R, W] int64, first token of each entry."""
    horizon_mask: Tensor
    """[B, h] float32."""
    sample_ids: Tensor
    """[B] int64, global sample indices."""
    micro_step: MicroStep

    @property
    def rows_per_sequence(self) -> int:
        """R / B: the baseline and its variants, or one uncompressed row (W = T)."""
        return self.lods.size(0) // self.tokens.size(0)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`. Copies from pinned memory are asynchronous."""
        return replace(
            self, **{name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors()}
        )

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors()})

    def share_memory(self) -> "Batch":
        """Move the batch to shared memory. Raises RuntimeError if that is full."""
        return replace(self, **{name: tensor.share_memory_() for name, tensor in self._tensors()})

    def _tensors(self) -> list[tuple[str, Any]]:
        return [
            (field.name, getattr(self, field.name))
            for field in fields(self)
            if field.name != "micro_step"
        ]
