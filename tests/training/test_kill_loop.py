"""kill -9 at 25 random moments, saves included: every restart continues by itself, and in the
end nothing shows that it happened.
"""

import random
import re
import signal

import pytest

from mc_ds.training.checkpoint import list_checkpoints
from tests.support.fault_ranks import records, start, tiny
from tests.support.tiny_run import TIMED, TIMEOUT_S, write_library

KILLS = 25
PHASES = ("data", "forward", "backward", "optimizer step", "metrics", "between steps")
OPERATIONS_OF_A_SAVE = (40, 8)
"""By rank, about how many files it opens, flushes, renames and removes."""


def moment(rng, rank):
    """A fault that kills a rank at a random place of its first four steps, or of its first
    saves.
    """
    if rng.random() < 0.5:
        return ["kill_in_step", rng.randint(1, 4), rng.choice(PHASES)]
    return ["kill_in_save", rng.randint(1, OPERATIONS_OF_A_SAVE[rank])]


def curve(folder, name):
    return [
        {key: value for key, value in record.items() if not key.endswith(TIMED)}
        for record in records(folder, name)
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_killed_at_25_random_moments(tmp_path, background):
    write_library(tmp_path / "library")
    rng = random.Random(6)
    changes = dict(
        train=dict(total_steps=64, global_batch_size=2),
        checkpoint=dict(interval=2, keep_last=2, background=background),
    )
    start(tmp_path, 2, tiny(tmp_path, "calm", **changes)).finish()
    config, reached = tiny(tmp_path, "killed", **changes), 0
    checkpoints = tmp_path / "runs/killed/checkpoints"
    for _ in range(KILLS):
        victim = rng.randint(0, 1)
        ranks = start(tmp_path, 2, config, faults={victim: moment(rng, victim)})
        ranks.processes[victim].join(TIMEOUT_S)
        assert ranks.processes[victim].exitcode == -signal.SIGKILL, ranks.text()
        ranks.kill()  # as a launcher or a dead node would
        said = ranks.text(0)
        assert "damaged" not in said
        continued = re.search(r"resumes after step (\d+) from", said)
        assert int(continued[1]) == reached if continued else reached == 0
        reached = max(
            [
                reached,
                *(int(path.name.removeprefix("step_")) for path in list_checkpoints(checkpoints)),
            ]
        )
    last = start(tmp_path, 2, config)
    last.finish()
    assert f"resumes after step {reached} from" in last.text(0)
    assert reached < 64
    if not background:  # else the disk's speed decides which are published before a kill
        assert reached >= 12, "it did get on in between"
    assert curve(tmp_path, "killed") == curve(tmp_path, "calm")
    whole = [path.name for path in list_checkpoints(checkpoints)]
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted([*whole, "latest"])
    assert len(whole) == 2
