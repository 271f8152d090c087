"""Processes that ingest into a disk tree until they are killed.

Imported and run once by a test, this forks one ingesting process per line of its input, so that a start costs milliseconds.
"""

import os
import random
import sys
from pathlib import Path

import torch

from mc_ds.inference.tree.disk import DiskTree
from mc_ds.inference.tree.nets import TreeNets
from tests.support.trees import HASHES, stream, tree_nets


def ingest(folder: Path, log: int, nets: TreeNets) -> None:
    """Ingests the stream from where the tree ends, in chunks of any size, and logs the committed tokens; never returns."""
    tree, rng = (
        DiskTree(folder, nets, **HASHES, commit_tokens=1000, batch_tokens=400),
        random.Random(os.getpid()),
    )
    while True:
        size = rng.choice([1, 1, 5, rng.randrange(300), rng.randrange(3000)])
        tree.append(stream(len(tree), len(tree) + size))
        if rng.random() < 0.1:
            tree.commit()
        os.write(log, f"{tree.committed}\n".encode())


def main() -> None:
    """Per line of input, the folder of a tree: forks, says the process id, waits for its end and says so."""
    torch.set_num_threads(1)
    nets = tree_nets()
    for line in sys.stdin:
        folder = Path(line.strip())
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if (child := os.fork()) == 0:
            ingest(folder, log, nets)
        os.close(log)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
