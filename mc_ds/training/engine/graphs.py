"""CUDA graphs: runs forward and backward of a function of tensors with one launch each.

In eager mode the host launches thousands of kernels per step, which takes longer than a small
model's computation. A graph is captured once per set of input shapes, with fixed memory for inputs
and outputs. This is transparent for callers: inputs are copied in, results and gradients are new
tensors, and hooks of parameters run as usual.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from mc_ds.model.recording import WARM_UP_RUNS, CudaRecorder, Recorder


class GraphedFunction:
    """Calls `function(*inputs)` as CUDA graphs.

    Inputs must be tensors, and the result a tensor, or a NamedTuple of tensors, constants and such
    NamedTuples. The function may read the parameters of `module`: new values are used, and if one
    moves to other memory the graph is captured again. The function must not synchronise,
    communicate, or depend on other changing values. Call the result's backward pass at most once,
    and before the next call with the same shapes.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        module: nn.Module | None = None,
        *,
        recorder: Recorder | None = None,
    ) -> None:
        self._reader = _Reader(function, module)
        self._parameters = list(self._reader.parameters())
        self._recorder = recorder or CudaRecorder()
        self._recordings: dict[Any, _Recording] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the function's result. The first call with new shapes captures the graphs."""
        assert not (torch.is_autocast_enabled() and torch.is_autocast_cache_enabled()), (
            "autocast must not cache: the graph would use weights that were cast outside of it"
        )
        key = tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        recording = self._recordings.get(key)
        if recording is None or recording.places != _places(self._parameters):
            recording = _Recording(self._reader, inputs, self._recorder)
            self._recordings[key] = recording
        with torch.no_grad():
            torch._foreach_copy_(recording.inputs, [x.detach() for x in inputs])
        leaves = [*(x for x in inputs if x.requires_grad), *recording.trained]
        outputs = _Replay.apply(recording, *leaves)
        return _filled(recording.template, iter(outputs))


class _Reader(nn.Module):
    """A module that calls a function and has its parameters, for `functional_call`."""

    def __init__(self, function: Callable[..., Any], module: nn.Module | None) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *inputs: Tensor) -> Any:
        """Call the function."""
        return self.function(*inputs)


class _Recording:
    """The captured forward and backward for one set of shapes."""

    def __init__(self, reader: _Reader, inputs: Sequence[Tensor], recorder: Recorder) -> None:
        parameters = dict(reader.named_parameters())
        self.places = _places(parameters.values())
        self.trained = [p for p in parameters.values() if p.requires_grad]
        arguments = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        self.inputs = [x.detach() for x in arguments]
        # Autograd binds a parameter to the stream of its first use, not to the capture stream.
        # Therefore differentiate with respect to other tensors in the same memory.
        aliases = {
            name: p.detach().requires_grad_(p.requires_grad) for name, p in parameters.items()
        }
        leaves = [x for x in (*arguments, *aliases.values()) if x.requires_grad]
        self._shapes = [leaf.shape for leaf in leaves]
        self._used: list[bool] = []
        self.turn = 0
        """Number of calls; only the last one may run backward."""
        self.gradients: list[Tensor] = []
        """Incoming gradients of the differentiable outputs, the backward graph's inputs."""
        results: list[Any] = []

        def forward() -> list[Tensor]:
            results[:] = [functional_call(reader, aliases, tuple(arguments))]
            return list(_tensors(results[0]))

        def backward() -> list[Tensor]:
            roots = [x for x in _tensors(results[0]) if x.requires_grad]
            self.gradients = self.gradients or [torch.zeros_like(x) for x in roots]
            found = torch.autograd.grad(roots, leaves, self.gradients, allow_unused=True)
            self._used = [gradient is not None for gradient in found]
            given = [gradient for gradient in found if gradient is not None]
            assert len({gradient.dtype for gradient in given}) == 1, "gradients of several types"
            return [torch.cat([gradient.flatten() for gradient in given])]

        for _ in range(WARM_UP_RUNS):
            recorder.warm_up(lambda: (forward(), leaves and backward()))
        self.outputs, self.run_forward = recorder.record(forward)
        self.differentiable = [x.requires_grad for x in self.outputs]
        if leaves:
            (self._gradient,), self.run_backward = recorder.record(backward)
        self.template = _emptied(results.pop())

    def new_gradients(self) -> list[Tensor | None]:
        """Return new tensors with the gradients of all leaves; None for unused leaves."""
        used = list(zip(self._shapes, self._used, strict=True))
        sizes = [shape.numel() for shape, is_used in used if is_used]
        pieces = iter(self._gradient.clone().split(sizes))
        return [next(pieces).view(shape) if is_used else None for shape, is_used in used]


class _Replay(torch.autograd.Function):
    """Autograd function that replays a recording."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, *leaves: Tensor) -> tuple[Tensor, ...]:
        """Replay the forward. `leaves` are arguments only so that autograd asks for their
        gradients.
        """
        recording.run_forward()
        recording.turn += 1
        ctx.recording, ctx.turn = recording, recording.turn
        ctx.set_materialize_grads(False)
        outputs = tuple(x.detach().clone() for x in recording.outputs)
        flags = zip(outputs, recording.differentiable, strict=True)
        ctx.mark_non_differentiable(*(x for x, differentiable in flags if not differentiable))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Replay the backward with the outputs' gradients (None: zero)."""
        recording = ctx.recording
        assert ctx.turn == recording.turn, "a call with the same shapes came before this backward"
        flags = zip(gradients, recording.differentiable, strict=True)
        given = [gradient for gradient, differentiable in flags if differentiable]
        for place, gradient in zip(recording.gradients, given, strict=True):
            place.zero_() if gradient is None else place.copy_(gradient)
        recording.run_backward()
        return None, *recording.new_gradients()


_TENSOR = object()
"""Placeholder for a tensor in a template."""


def _tensors(result: Any) -> Iterator[Tensor]:
    """Yield the tensors of a function's result, in order."""
    if isinstance(result, Tensor):
        yield result
    elif hasattr(result, "_fields"):
        for field in result:
            yield from _tensors(field)


def _emptied(result: Any) -> Any:
    """Return a result's template: the result with a placeholder for each tensor."""
    if isinstance(result, Tensor):
        return _TENSOR
    if hasattr(result, "_fields"):
        return type(result)(*(_emptied(field) for field in result))
    return result


def _filled(template: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a template with its placeholders replaced by `tensors`, in order."""
    if template is _TENSOR:
        return next(tensors)
    if hasattr(template, "_fields"):
        return type(template)(*(_filled(field, tensors) for field in template))
    return template


def _places(parameters: Iterable[nn.Parameter]) -> list[int]:
    """Return the memory addresses of the parameters."""
    return [parameter.data_ptr() for parameter in parameters]
