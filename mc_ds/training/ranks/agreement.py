"""What all ranks do together because one of them has something to say: errors, facts that must be equal, and the wish to stop.

All functions are collectives, to be called by every rank; in a process without a group they answer for itself.
"""

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mc_ds.config import ConfigError
from mc_ds.config.compare import differing
from mc_ds.storage import reason
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped

T = TypeVar("T")
MAX_DIFFERENCES = 4
"""Differing facts named in one line; more are counted."""


def rank_and_world() -> tuple[int, int]:
    """This rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: T) -> list[T]:
    """The small picklable value of every rank, by rank."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's value."""
    if rank_and_world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(action: Callable[[], T]) -> T:
    """Return on all ranks what `action` returns on rank 0; where that cannot read, raise its ConfigError on all."""
    results: list[T] = []
    problem: str | None = None
    if rank_and_world()[0] == 0:
        try:
            results.append(action())
        except ConfigError as error:
            problem = str(error)
        except (OSError, KeyError) as error:  # the others are waiting
            problem = reason(error)
    results, problem = broadcast((results, problem))
    if problem is not None:
        raise ConfigError(problem)
    return results[0]


def agree(error: Exception | None) -> None:
    """Raises on all ranks the error of the lowest rank that has one, naming that rank unless all have the same; none: returns."""
    said = gather(
        None
        if error is None
        else (str(error), error.code if isinstance(error, RunStopped) else ExitCode.CONFIG)
    )
    for rank, words in enumerate(said):
        if words is not None:
            prefix = "" if set(said) == {words} else f"rank {rank}: "
            raise RunStopped(f"{prefix}{words[0]}", words[1], on_all_ranks=True) from error


def require_equal(facts: Mapping[str, Any]) -> None:
    """Raises RunStopped on all ranks, naming rank, fact and both values, where `facts` differ from rank 0's. Values are JSON's."""
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


class Wish(IntEnum):
    """What a rank wants at the end of a step; the largest wish of any rank counts."""

    GO_ON = 0
    STOP = 1
    FAIL = 2


class StepAgreement:
    """The ranks' largest wish at a boundary between steps.

    It is sent before the optimizer's step, which reduces gradients and waits for that, and read after it: nothing waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: tuple[Any, torch.Tensor, torch.cuda.Event | None] | None = None

    def send(self, mine: Wish) -> None:
        """Sends this rank's wish."""
        wish = torch.full((1,), int(mine), dtype=torch.int32, device=self._device)
        work = dist.all_reduce(wish, op=dist.ReduceOp.MAX, async_op=True)
        self._pending = self._in_flight(work, wish)

    def read(self) -> Wish:
        """The largest of the wishes that were sent last."""
        assert self._pending is not None, "send first"
        work, wish, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        else:
            work.wait()
        return Wish(int(wish))

    def _in_flight(
        self, work: Any, wish: torch.Tensor
    ) -> tuple[Any, torch.Tensor, torch.cuda.Event | None]:
        if not wish.is_cuda:
            return work, wish, None
        work.wait()  # orders the copy after the reduction, on the device; the host goes on
        pinned = torch.empty(wish.shape, dtype=wish.dtype, pin_memory=True).copy_(
            wish, non_blocking=True
        )
        copied = torch.cuda.Event()
        copied.record()
        return work, pinned, copied
