"""Shortcuts through DeepSpeed's ZeRO-3 on GPUs: the same gradients and the same optimizer step with
fewer passes over memory, and with the host ahead of the device.

Bytes that a rank reads and writes per element of its partition, in bf16 with fp32 gradients:

| | DeepSpeed | here |
|---|---|---|
| norm, of copies in float64 | 20 | 4 |
| gradients joined into one tensor, then clipped | 16 | |
| AdamW | 28 | 30 with clipping and bf16 weights |
| bf16 copy of the weights | 6 | |
| gradients on one rank: bucket, join, divide, to fp32, partition | 26 | 6 |

DeepSpeed keeps the gradients of all sub-groups in one fp32 buffer, in the order of the sub-groups,
so that each sub-group's gradient is a view of it. The host reads the norm while AdamW runs; on the
device, AdamW itself leaves weights and moments as they are if the norm is not finite.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mc_ds.training.engine.host_copy import copy_to_host

Shortcut = Literal["step", "gradients"]
SHORTCUTS: tuple[Shortcut, ...] = ("step", "gradients")
"""Parts of ZeRO-3 that can be replaced: the optimizer's step, and the way of gradients to their
partition on a single rank.
"""

WRITTEN = (
    "step",
    "overflow",
    "_global_grad_norm",
    "averaged_gradients",
    "reduce_independent_p_g_buckets_and_remove_grads",
    "reduce_and_partition_stream",
)
"""Attributes of DeepSpeed's optimizer that are set here. If it lost one, nothing would read it."""

NORM_PIECE = 2**24
"""Elements of a gradient whose norm is computed in one piece."""


def take_shortcuts(
    optimizer: Any, *, compiled: bool, shortcuts: Collection[Shortcut] = SHORTCUTS
) -> None:
    """Replace parts of DeepSpeed's ZeRO-3 `optimizer`, which must hold its state on the device.

    If `compiled`, AdamW, clipping and the copy of the weights are one compiled function; otherwise
    they are those of torch and DeepSpeed.
    """
    assert not optimizer.offload_optimizer, "the optimizer's state is not on the device"
    missing = [name for name in WRITTEN if not hasattr(optimizer, name)]
    assert not missing, f"DeepSpeed's ZeRO-3 optimizer has no {', '.join(missing)}"
    if "step" in shortcuts:
        optimizer.step = Zero3Step(optimizer, compiled=compiled)
    if "gradients" in shortcuts and optimizer.partition_count == 1:
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = OwnGradients(optimizer)
    stream = optimizer.reduce_and_partition_stream
    if stream is not None and stream != torch.cuda.default_stream():
        optimizer.reduce_and_partition_stream = _OrderedStream()
    gathers = optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
    if gathers is not None and optimizer.partition_count > 1:
        optimizer.step = _GatherAfter(optimizer.step, gathers)


class Zero3Step:
    """Replacement of DeepSpeed's optimizer step.

    Like DeepSpeed's, it clips the gradient, and skips the step if the norm is not finite:
    `optimizer.overflow` is then True. Norms are computed in float32, so a gradient above 1.8e19
    counts as not finite.
    """

    def __init__(self, optimizer: Any, *, compiled: bool) -> None:
        assert optimizer.loss_scale == 1, "only bf16 and fp32 have no loss scale"
        self._zero = optimizer
        # Sub-groups have many sizes.
        self._update = torch.compile(adamw, dynamic=True) if compiled else None

    @torch.no_grad()
    def __call__(self, closure: None = None) -> None:
        """Take the step. A collective."""
        zero = self._zero
        zero._pre_step()
        zero._partition_all_parameters()
        norm = self._norm()
        read = copy_to_host(norm)
        scale = (zero.clip_grad / (norm + 1e-6)).clamp_max(1.0) if zero.clip_grad > 0 else None
        if self._update is not None:
            self._update_all(self._update, norm, torch.ones_like(norm) if scale is None else scale)
        value = float(read())
        zero.overflow = not math.isfinite(value)
        if zero._loss_scale_update_and_overflow_cleanup():
            return
        zero._global_grad_norm = value
        zero.zero_grad(set_to_none=True)
        if self._update is None:
            self._step_in_parts(scale)
        zero.averaged_gradients = {}
        zero._post_step(set())

    def _norm(self) -> Tensor:
        """Return the norm of all ranks' gradients, float32 (0-d); not finite if any is not."""
        pieces = self._zero.grad_partitions_flat_buffer.split(NORM_PIECE)
        total = torch.stack(torch._foreach_norm(pieces, 2, torch.float32)).double().square().sum()
        dist.all_reduce(total, group=self._zero.dp_process_group)
        return total.sqrt().float()

    def _sub_groups(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield index, fp32 weights and gradient of each sub-group."""
        start = 0
        for number, master in enumerate(self._zero.fp32_partitioned_groups_flat):
            gradient = self._zero.grad_partitions_flat_buffer.narrow(0, start, master.numel())
            start += master.numel()
            assert self._zero.averaged_gradients[number][0].data_ptr() == gradient.data_ptr()
            yield number, master, gradient

    def _update_all(self, update: Callable[..., None], norm: Tensor, scale: Tensor) -> None:
        """Launch the update of all sub-groups, which has no effect if `norm` is not finite."""
        zero, adamw = self._zero, self._zero.optimizer
        applied = norm.isfinite()
        for number, master, gradient in self._sub_groups():
            group = adamw.param_groups[zero.sub_group_to_group_id[number]]
            state = adamw.state[master]
            if not state:
                state["step"] = torch.zeros((), device=master.device)
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(master, requires_grad=False) for _ in range(2)
                )
            state["step"] = state["step"] + applied
            low = zero.fp16_partitioned_groups_flat[number]
            update(
                master.detach(),
                gradient.to(master.dtype),
                state["exp_avg"],
                state["exp_avg_sq"],
                None if low.data_ptr() == master.data_ptr() else low,
                factors(state["step"], scale, applied, group),
            )
            zero._unflatten_partitioned_parameters(number)

    def _step_in_parts(self, scale: Tensor | None) -> None:
        """Clip, step and copy with one kernel each."""
        zero = self._zero
        for number, master, gradient in list(self._sub_groups()):
            master.grad = gradient.to(master.dtype)
            if scale is not None:
                master.grad.mul_(scale)
            zero._optimizer_step(number)
            zero._reassign_or_swap_out_partitioned_parameters(number)
            zero._release_sub_group(number, set())


class Factors(NamedTuple):
    """The numbers of one step of `adamw`, each a float32 scalar on the device (0-d)."""

    applied: Tensor
    """1 to change weights and moments, 0 to leave them as they are."""
    scale: Tensor
    """Of the gradient."""
    decay: Tensor
    """Factor of the weights: 1 - learning rate * weight decay."""
    rate: Tensor
    """Learning rate over the correction of the first moment."""
    root: Tensor
    """Reciprocal root of the correction of the second moment."""
    beta1: Tensor
    rest1: Tensor
    """1 - beta1."""
    beta2: Tensor
    rest2: Tensor
    """1 - beta2."""
    eps: Tensor


def factors(step: Tensor, scale: Tensor, applied: Tensor, group: dict[str, Any]) -> Factors:
    """Return the factors of the optimizer's `group` at its step number `step` (0-d), without
    waiting for the device.
    """
    count = step.double().clamp_min(1)
    beta1, beta2 = (torch.full_like(count, beta) for beta in group["betas"])
    rate = torch.full_like(count, group["lr"])
    numbers = Factors(
        applied.double(),
        scale.double(),
        1 - rate * group["weight_decay"],
        rate / (1 - beta1**count),
        (1 - beta2**count).rsqrt(),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        torch.full_like(count, group["eps"]),
    )
    return Factors(*torch.stack(numbers).float().unbind())


def adamw(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low: Tensor | None,
    factors: Factors,
) -> None:
    """Update fp32 weights and moments in place like torch's AdamW; copy the weights to `low`."""
    applied, scaled = factors.applied > 0, gradient * factors.scale
    first = factors.beta1 * exp_avg + factors.rest1 * scaled
    second = factors.beta2 * exp_avg_sq + factors.rest2 * scaled * scaled
    new = master * factors.decay - factors.rate * first / (
        second.sqrt() * factors.root + factors.eps
    )
    new = torch.where(applied, new, master)
    exp_avg.copy_(torch.where(applied, first, exp_avg))
    exp_avg_sq.copy_(torch.where(applied, second, exp_avg_sq))
    master.copy_(new)
    if low is not None:
        low.copy_(new)


class OwnGradients:
    """Adds gradients to the only rank's partition at once, in one pass: there is nothing to
    reduce.
    """

    def __init__(self, optimizer: Any) -> None:
        self._zero = optimizer
        self._places: dict[int, tuple[int, int]] = {}
        """Offset and length in the gradients' buffer, by the parameter's `ds_id`."""
        start = 0
        for group in optimizer.fp16_groups:
            for parameter in group:
                length = parameter.partition_numel()
                self._places[parameter.ds_id] = (start, length)
                start += length

    @torch.no_grad()
    def __call__(self, parameter: nn.Parameter) -> None:
        """Move `parameter.grad` to the buffer; in later micro-steps, add it."""
        gradient = parameter.grad
        assert gradient is not None
        start, length = self._places[parameter.ds_id]  # type: ignore[attr-defined]
        place = self._zero.grad_partitions_flat_buffer.narrow(0, start, length)
        place = place[: gradient.numel()].view(gradient.shape)
        if self._zero.micro_step_id == 0:
            place.copy_(gradient)
        else:
            place.add_(gradient)
        parameter.grad = None


class _GatherAfter:
    """A step of the optimizer for which later gathers of weights wait, on the device.

    DeepSpeed gathers on a stream of its own, which waits for no other. Only its gather of
    persistent parameters after each step, for which the host waits, would keep the next forward
    pass from gathering weights while they are being updated. A single rank gathers nothing, and
    there its host would wait for that stream.
    """

    def __init__(self, step: Callable[..., None], gathers: torch.cuda.Stream) -> None:
        self._step, self._gathers = step, gathers

    def __call__(self, closure: None = None) -> None:
        """Take the step."""
        self._step(closure)
        self._gathers.wait_stream(torch.cuda.current_stream())


class _OrderedStream(torch.cuda.Stream):
    """A stream for which the current stream waits, instead of the host.

    DeepSpeed reduces gradients on it, and synchronises with it at the end of a backward pass.
    """

    def synchronize(self) -> None:
        """Let the current stream wait for the work on this one."""
        torch.cuda.current_stream().wait_stream(self)
