"""Starts ranks for tests of faults, signals them and reads how they ended.

Ranks are forked from a process that has imported everything (tests/support/fault_worker.py), so
that a start costs a second and not ten.
"""

import json
import multiprocessing
import os
import socket
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.support.processes import inherited
from tests.support.tiny_run import ONLY_CPU, TIMEOUT_S, settings

FORKS = multiprocessing.get_context("forkserver")
TINY = dict(validation=dict(eval_interval=0), mc=dict(num_random_variants=2))


@dataclass
class Ranks:
    """Processes of one attempt to run."""

    processes: list[BaseProcess]
    outputs: list[Path]

    def wait(self):
        """Exit codes, when all have ended; whoever has not ended in time is killed and the test
        fails.
        """
        deadline = time.monotonic() + TIMEOUT_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        assert not late, f"ranks {late} did not end:\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def finish(self):
        """Expects all ranks to end well."""
        assert set(self.wait()) == {0}, self.text()

    def signal(self, number, rank=None):
        for process in self.processes if rank is None else [self.processes[rank]]:
            os.kill(process.pid, number)

    def kill(self):
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def text(self, rank=None):
        """What the ranks have written."""
        return "".join(
            path.read_text(errors="replace")
            for path in (self.outputs if rank is None else [self.outputs[rank]])
        )

    def errors(self):
        """The lines that tell a person what went wrong."""
        return [line for line in self.text().splitlines() if line.startswith("error: ")]


def start(folder, world_size, config, faults=None, overrides=None):
    """Starts the ranks. `faults` maps a rank to [name, arguments...] of a fault; `overrides` a
    rank to its own further options.
    """
    _start_fork_server()
    recipe = folder / f"{config['name']}.yaml"
    recipe.write_text(json.dumps(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = Ranks([], [])
    for rank in range(world_size):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_SIZE": max(2, world_size),
        }
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = folder / f"{config['name']}-{time.monotonic_ns()}-{rank}.txt"
        arguments = ["--config", str(recipe), *(overrides or {}).get(rank, [])]
        process = FORKS.Process(
            target=_rank, args=(folder, variables, arguments, (faults or {}).get(rank), output)
        )
        process.start()
        ranks.processes.append(process)
        ranks.outputs.append(output)
    return ranks


def tiny(folder, name, stage=3, **changes):
    """A recipe whose six steps take a second or two; two checkpoints."""
    merged = {
        key: {**TINY.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in {**TINY, **changes}.items()
    }
    return settings(folder, name, stage, **{"train": {}, **merged})


def records(folder, name):
    """What the run has recorded."""
    return [
        json.loads(line)
        for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    ]


def _rank(*arguments):
    """Target of a rank's process: imports what the fork server has imported already."""
    from tests.support import fault_worker

    fault_worker.rank_main(*arguments)


def _start_fork_server():
    """Starts it with an environment of its own."""
    before = dict(os.environ)
    os.environ.update(inherited(**ONLY_CPU))
    try:
        FORKS.set_forkserver_preload(["tests.support.fault_worker"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
