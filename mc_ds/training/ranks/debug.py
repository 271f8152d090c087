"""`debug: true`: compares micro-batches between ranks, so that ranks that diverge stop with an
error instead of hanging.
"""

import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from mc_ds.data import Batch, MicroBatchDataset
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.ranks.agreement import rank_and_world


def cross_checked(
    batches: Iterator[Batch], neighbour: MicroBatchDataset, device: torch.device
) -> Iterator[Batch]:
    """Yield `batches`, after comparing each one between ranks. Raises RunStopped on all ranks if
    they differ.

    `neighbour` makes the micro-batches of rank + 1 (on the last rank, of rank 0). Each rank sends
    its MicroStep, a hash of its own micro-batch, and a hash of that which it makes for its
    neighbour. Both hashes of a micro-batch must be equal, because it depends only on MicroStep,
    data, config and seed. Costs one all-gather per micro-step, and makes every micro-batch twice.
    """
    for batch in batches:
        step = batch.micro_step
        row = [fingerprint(batch), fingerprint(neighbour[step]), *step]
        mine = torch.tensor([row], dtype=torch.int64, device=device)
        table = mine.new_empty(rank_and_world()[1], len(row))
        dist.all_gather_into_tensor(table, mine)
        check_table(table.tolist())
        yield batch


def fingerprint(batch: Batch) -> int:
    """Return a 63-bit hash of a micro-batch's samples, their weights and the variant plans."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (batch.tokens, batch.lods, batch.starts, batch.horizon_mask, batch.sample_ids):
        digest.update(tensor.contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


def check_table(table: list[list[int]]) -> None:
    """Raise RunStopped if the rows of `table`, one per rank, contradict each other.

    A row has the rank's hash, the hash it computed for its neighbour, step, micro-step, W and
    stage.
    """
    names = ("step", "micro-step", "working-context length", "data stage")
    for rank, (_, _, *identity) in enumerate(table):
        for name, value, expected in zip(names, identity, table[0][2:], strict=True):
            if value != expected:
                raise _diverged(f"{name} {value} on rank {rank}, {expected} on rank 0")
    for rank, (_, predicted, *identity) in enumerate(table):
        other = (rank + 1) % len(table)
        if predicted != table[other][0]:
            where = f"step {identity[0]}, micro-step {identity[1]}"
            raise _diverged(
                f"rank {other}'s samples or variant plans differ from those that rank {rank}"
                f" computes for it ({where})"
            )


def _diverged(what: str) -> RunStopped:
    return RunStopped(
        f"ranks differ: {what}: compare their data, versions and settings",
        ExitCode.RANKS_DIFFER,
        on_all_ranks=True,
    )
