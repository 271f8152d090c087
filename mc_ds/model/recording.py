"""Records work on a GPU as CUDA graphs, each of which is launched at once.

Training records whole forward and backward passes, inference the decoder's step, the recomputation
of its cache, and LensNet. A graph reads and writes fixed memory: new inputs are copied there before
it is launched.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UP_RUNS = 2
"""Runs before capture, in which kernels are compiled, tuned and loaded."""


class Recorder(Protocol):
    """Records and replays functions that read and write fixed memory."""

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Call `work` once without recording it."""
        ...

    def record(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Record `work`. Return its result tensors, and a function that replays it and updates them
        in place.
        """
        ...


class CudaRecorder:
    """Captures CUDA graphs. All graphs of a recorder share memory, so only one may run at a
    time.
    """

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Call `work` once, on the capture stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Capture `work`. Its results are undefined until the first replay."""
        graph = torch.cuda.CUDAGraph()
        # Other threads pin memory of batches meanwhile, which only thread-local capture permits.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            results = work()
        return results, graph.replay


class Capturing:
    """Captures work on one device: warms it up, and records it. The recorder is made at the first
    capture, by default one of CUDA graphs.
    """

    def __init__(self, device: torch.device, recorder: Recorder | None = None) -> None:
        self._device, self._recorder = device, recorder

    def __call__(
        self, work: Callable[[], list[Tensor]], *, before: Callable[[], Any] = lambda: None
    ) -> Callable[[], None]:
        """Return what launches `work`, which reads and writes fixed memory. It also runs here,
        several times, each time after a call of `before`.
        """
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            self._recorder = self._recorder or CudaRecorder()
            for _ in range(WARM_UP_RUNS):
                before()
                self._recorder.warm_up(work)
            before()
            return self._recorder.record(work)[1]
