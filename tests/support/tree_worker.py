"""Processes that ingest into a disk tree until they kill themselves, in the middle of a chosen
system call.

Imported and run once by a test, this forks one ingesting process per line of its input, so that
a start costs milliseconds.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mc_ds.inference.tree import checksums
from mc_ds.inference.tree.disk import DiskTree
from mc_ds.inference.tree.nets import TreeNets
from tests.support.trees import HASHES, PIECE_BYTES, stream, tree_nets


def die_in_call(number: int) -> None:
    """SIGKILL in the middle of this process's write, flush or rename of that number: half of
    what a write holds is written.
    """
    calls = 0

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                if function is pwrite:
                    handle, data, offset = arguments
                    pwrite(handle, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    pwrite = os.pwrite
    os.pwrite, os.fsync, os.replace = mortal(os.pwrite), mortal(os.fsync), mortal(os.replace)


def ingest(folder: Path, log: int, nets: TreeNets, seed: int) -> None:
    """Ingests the stream from where the tree ends, in chunks of any size, and logs the committed
    tokens; never returns.
    """
    tree = DiskTree(folder, nets, **HASHES, commit_tokens=1000, batch_tokens=400)
    rng = random.Random(seed)
    while True:
        size = rng.choice([1, 1, 5, rng.randrange(300), rng.randrange(3000)])
        tree.append(stream(len(tree), len(tree) + size))
        if rng.random() < 0.1:
            tree.commit()
        os.write(log, f"{tree.committed}\n".encode())


def main() -> None:
    """Per line of input, the number of the call to die in and the folder of a tree: forks, waits
    for the end and says how it was.
    """
    torch.set_num_threads(1)
    checksums.PIECE_BYTES = PIECE_BYTES
    nets = tree_nets()
    for line in sys.stdin:
        number, name = line.rstrip("\n").split(" ", 1)
        folder = Path(name)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if (child := os.fork()) == 0:
            die_in_call(int(number))
            ingest(folder, log, nets, seed=int(number))
        os.close(log)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
