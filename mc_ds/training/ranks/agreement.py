"""Collective actions: run a function and share its errors, compare facts, decide to stop.

`agreed` runs an action on every rank, `on_main` on rank 0 only. An error on any rank ends the run
on all of them, with the same message and exit code. Every rank must call these functions together;
without a process group they apply to this process.
"""

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist

from mc_ds.config import ConfigError
from mc_ds.config.compare import differing
from mc_ds.storage import reason
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped

T = TypeVar("T")
MAX_DIFFERENCES = 4
"""Number of differing facts listed in a message; the rest are only counted."""


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: T) -> list[T]:
    """Return the `value` of every rank, in order of rank. Values are pickled; keep them small."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Return rank 0's value on all ranks."""
    if rank_and_world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def is_main() -> bool:
    """Return whether this is rank 0. True without a process group."""
    return rank_and_world()[0] == 0


def agreed(action: Callable[[], T], *, doing: str = "") -> T:
    """Run `action` on every rank and return this rank's result.

    If it fails on any rank, `agree` raises on all of them.
    """
    results, error = _attempt(action)
    agree(error, doing=doing)
    return results[0]


def on_main(action: Callable[[], T], *, doing: str = "") -> T:
    """Run `action` on rank 0 only, and return its result, which must pickle, on all ranks.

    Errors are raised on all ranks as in `agree`.
    """
    results, error = _attempt(action) if is_main() else ([], None)
    results, failure = broadcast((results, _describe(error, doing)))
    if failure is not None:
        _stop(*failure, error)
    return results[0]


def agree(error: Exception | None, *, doing: str = "") -> None:
    """Raise RunStopped on all ranks if any rank passes an error.

    The message is that of the lowest rank with an error. It names that rank, unless all have the
    same error, and starts with `doing`, unless the error is a RunStopped. The exit code is CONFIG
    for a ConfigError, STORAGE for an OSError. Any other error is raised again on its own rank, and
    stops the others with FAILED.
    """
    failures = gather(_describe(error, doing))
    for rank, failure in enumerate(failures):
        if failure is not None:
            line, code = failure
            _stop(line if set(failures) == {failure} else f"rank {rank}: {line}", code, error)


def _attempt(action: Callable[[], T]) -> tuple[list[T], Exception | None]:
    """Return ([result], None) or ([], error). Catches every error, because other ranks wait."""
    try:
        return [action()], None
    except Exception as error:
        return [], error


def _describe(error: Exception | None, doing: str) -> tuple[str, ExitCode] | None:
    """Return the message and exit code for an error; None for None."""
    prefix = f"{doing}: " if doing else ""
    match error:
        case None:
            return None
        case RunStopped():
            return str(error), error.code
        case ConfigError():
            return f"{prefix}{error}", ExitCode.CONFIG
        case OSError():
            return f"{prefix}{reason(error)}", ExitCode.STORAGE
        case _:
            return f"{prefix}{reason(error)}", ExitCode.FAILED


def _stop(line: str, code: ExitCode, own_error: Exception | None) -> NoReturn:
    if own_error is not None and code is ExitCode.FAILED:
        raise own_error
    raise RunStopped(line, code, on_all_ranks=code is not ExitCode.FAILED) from own_error


def require_equal(facts: Mapping[str, Any]) -> None:
    """Raise RunStopped on all ranks if a rank's `facts` differ from rank 0's.

    The message has rank, fact and both values. Values must be JSON values.
    """
    expected = broadcast(dict(facts))
    lines = [
        f"{key} = {facts.get(key)!r} here, {expected.get(key)!r} on rank 0"
        for key in differing(facts, expected)
    ]
    if len(lines) > MAX_DIFFERENCES:
        lines[MAX_DIFFERENCES:] = [f"and {len(lines) - MAX_DIFFERENCES} more"]
    agree(
        ConfigError(
            f"{'; '.join(lines)}: start all ranks with the same settings, data and versions"
        )
        if lines
        else None
    )


class Request(IntEnum):
    """What a rank requests at the end of a step. The largest request of all ranks applies."""

    GO_ON = 0
    STOP = 1
    FAIL = 2


class Boundary(NamedTuple):
    """What the ranks sent before a step boundary, reduced over all of them."""

    request: Request
    writing: bool
    """Whether any rank is still writing a checkpoint in the background."""


class StepAgreement:
    """Reduces the requests of all ranks to their maximum, once per step.

    They are sent before the optimizer's step, which synchronises ranks anyway, and read after it,
    so that nothing waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: tuple[Any, torch.Tensor, torch.cuda.Event | None] | None = None

    def send(self, mine: Request, *, writing: bool = False) -> None:
        """Send this rank's request, and whether it is still writing a checkpoint."""
        # Filled on the device: a copy from the host's pageable memory would wait for the GPU.
        request = torch.full((2,), int(mine), dtype=torch.int32, device=self._device)
        request[1:].fill_(int(writing))
        work = dist.all_reduce(request, op=dist.ReduceOp.MAX, async_op=True)
        self._pending = self._in_flight(work, request)

    def read(self) -> Boundary:
        """Return the maximum over ranks of what the last `send` sent."""
        assert self._pending is not None, "send first"
        work, request, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        else:
            work.wait()
        largest, writing = request.tolist()
        return Boundary(Request(largest), bool(writing))

    def _in_flight(
        self, work: Any, request: torch.Tensor
    ) -> tuple[Any, torch.Tensor, torch.cuda.Event | None]:
        if not request.is_cuda:
            return work, request, None
        work.wait()  # orders the copy after the reduction on the device; the host does not wait
        pinned = torch.empty(request.shape, dtype=request.dtype, pin_memory=True).copy_(
            request, non_blocking=True
        )
        copied = torch.cuda.Event()
        copied.record()
        return work, pinned, copied
