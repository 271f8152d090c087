"""Trains LensNet, replicated on every rank outside the ZeRO engine.

Each micro-step backpropagates the *numerator* of the preference loss. After the last one, a single
all-reduce sums gradients, denominator and the moments of the gains, and the gradient is divided by
the denominator: the result does not depend on how sequences are distributed over ranks. All ranks
then take the same step, bit for bit. See docs/lensnet-pairwise-training.md ("Preference learning")
and docs/training.md ("Replication").
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mc_ds.config import MCConfig, TrainConfig
from mc_ds.data.batch import Batch
from mc_ds.geometry import lod1_cover
from mc_ds.model.lensnet import LensNet
from mc_ds.preference import GainMoments, PreferenceResult
from mc_ds.training.engine.engine import parameter_groups
from mc_ds.training.engine.host_copy import copy_to_host
from mc_ds.training.schedule import lens_learning_rate

WEIGHT_DECAY = 0.01
"""Weight decay of LensNet's matrices."""
CLIP_NORM = 1.0
"""Maximum norm of LensNet's gradient."""


class ReplicatedLens:
    """LensNet with its own AdamW, gradient clipping, schedule and running statistics."""

    def __init__(self, lensnet: LensNet, mc: MCConfig, train: TrainConfig) -> None:
        self.lensnet, self.mc, self.train = lensnet, mc, train
        self.parameters = [p for p in lensnet.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        for parameter in lensnet.parameters():
            dist.broadcast(parameter.data, src=0)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(lensnet, WEIGHT_DECAY),
            lr=mc.lens_lr,
            betas=(train.adam_beta1, train.adam_beta2),
            fused=self.device.type == "cuda",
        )
        self.moments = GainMoments(beta=mc.lens_adv_norm_beta, device=self.device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._gradient = torch.zeros(sum(p.numel() for p in self.parameters), device=self.device)
        """Gradients of all parameters in one tensor; each parameter's `grad` is a view of it."""
        self._norm = torch.zeros((), device=self.device)
        self._reading: Callable[[], Tensor] | None = None
        """Waits for the norm and the denominator on the host; set between `reduce` and
        `finish_step`.
        """
        self._wc_length: int | None = None
        self.steps_made = 0
        """Number of steps of LensNet's optimizer; the learning rate's warm-up counts these."""
        self.prepared = False
        """True if `prepare` was called or is not needed (a trained LensNet was loaded)."""
        self.finite = True
        """Whether the reduced gradient of the last step was finite; equal on all ranks."""

    @torch.no_grad()
    def prepare(self, lod0s: Iterable[Tensor]) -> None:
        """Whiten a new LensNet's index vectors.

        `lod0s` are the token embeddings [B, T, D] of each micro-batch of LensNet's first step. A
        collective: all ranks get equal weights.
        """
        index = self.lensnet.index
        assert index is not None, "there are no index vectors"
        dim = index.project.in_features
        total = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)
        tokens = torch.zeros((), dtype=torch.float64, device=self.device)
        for lod0 in lod0s:
            total += index.second_moment(lod0)
            tokens += lod0.shape[:-1].numel()
        dist.all_reduce(total)
        dist.all_reduce(tokens)
        index.whiten(total / tokens, int(tokens))
        dist.broadcast(index.project.weight.data, src=0)
        self.prepared = True

    def at_length(self, wc_length: int) -> None:
        """Set the context length of an optimizer step. A change resets the running statistics of
        gains.

        Call it for every step, also those in which LensNet does not run.
        """
        if self._wc_length is not None and wc_length != self._wc_length:
            self.moments.reset()
        self._wc_length = wc_length

    def start_step(self) -> None:
        """Start an optimizer step of LensNet: set gradients and sums to zero."""
        self._sums.zero_()
        self._gradient.zero_()
        pieces = self._gradient.split([p.numel() for p in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def accumulate(self, result: PreferenceResult) -> None:
        """Backpropagate the numerator of one micro-step's loss, and add up its denominator and gain
        moments.
        """
        result.numerator.backward()
        self._sums += torch.cat(
            [result.denominator.detach().view(1), result.gain_moments.detach()]
        ).double()

    def reduce(self) -> None:
        """Reduce gradient and sums over ranks after the last micro-step, and start to copy their
        norm to the host. A collective.
        """
        self._reduce()
        denominator = self._sums[0]
        self._gradient /= denominator.clamp_min(1e-12).float()
        self._norm = self._gradient.norm()
        self._reading = copy_to_host(torch.stack([self._norm.double(), denominator]))

    def finish_step(self, step: int, *, start_step: int, apply: bool) -> float | None:
        """Take LensNet's optimizer step with what `reduce` found. Return its gradient norm.

        Skips the step and returns None if `apply` is False (the engine skipped its own step), if no
        pair had a gain, or if the gradient is not finite. `start_step` is the step at which LensNet
        began to learn, from which its learning rate decays. Waits for `reduce`, but not for what
        was launched after it.
        """
        assert self._reading is not None, "reduce first"
        norm_value, denominator_value = self._reading().tolist()
        self._reading = None
        self.finite = math.isfinite(norm_value) and math.isfinite(denominator_value)
        if not apply or not denominator_value > 0 or not norm_value < float("inf"):
            return None
        self._gradient *= CLIP_NORM / self._norm.clamp_min(CLIP_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = lens_learning_rate(
                step, self.mc, self.train, start_step=start_step, steps_made=self.steps_made
            )
        self.optimizer.step()
        self.steps_made += 1
        self.moments.update(self._sums[1], self._sums[2])
        return float(norm_value)

    def _reduce(self) -> None:
        """Sum the gradient and the three sums over ranks, in place, with one all-reduce."""
        if dist.get_world_size() > 1:
            flat = torch.cat([self._gradient, self._sums.float()])
            dist.all_reduce(flat)
            self._gradient.copy_(flat[:-3])
            self._sums.copy_(flat[-3:])

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; equal on all ranks."""
        return {
            "lensnet": self.lensnet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "moments": self.moments.state_dict(),
            "wc_length": self._wc_length,
            "steps_made": self.steps_made,
            "prepared": self.prepared,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, but keep the optimizer settings of the config.

        Raises an error if names or shapes differ.
        """
        self.lensnet.load_state_dict(state["lensnet"])
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, ours in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(ours)
        self.moments.load_state_dict(state["moments"])
        self._wc_length = state["wc_length"]
        self.steps_made = state["steps_made"]
        self.prepared = state["prepared"]


def lens_plan(batch: Batch, mc: MCConfig) -> tuple[Tensor, Tensor]:
    """Return the plan of the entries that LensNet reads: that of the rows, [R, W], or with
    `random_blocks` the LOD1 cover of each sequence, [B, n_1 + tail].
    """
    if not mc.random_blocks:
        return batch.lods, batch.starts
    lods, starts = lod1_cover(mc.geometry, batch.tokens.device)
    rows = len(batch.tokens)
    return lods.expand(rows, -1), starts.expand(rows, -1)
