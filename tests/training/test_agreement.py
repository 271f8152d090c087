"""What ranks do together: one acts for all, and an error of any is the end of all, alike."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from mc_ds.config import ConfigError
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.ranks.agreement import agreed, on_main, require_equal

WORLD = 3


def fails_on(ranks: set[int], error: Exception) -> Callable[[], Any]:
    def action() -> int:
        rank = dist.get_rank()
        if rank in ranks:
            raise error
        return 10 * rank

    return action


FULL = OSError(28, "No space left on device", "there")
CASES: dict[str, Callable[[], Any]] = {
    "each its own": lambda: agreed(fails_on(set(), FULL)),
    "rank 0 for all": lambda: on_main(lambda: {"pid": os.getpid(), "rank": dist.get_rank()}),
    "setting, all alike": lambda: agreed(fails_on({0, 1, 2}, ConfigError("a = 1: use 2"))),
    "setting, on one": lambda: agreed(fails_on({2}, ConfigError("a = 1: use 2")), doing="start"),
    "disk, on one": lambda: agreed(fails_on({1}, FULL), doing="cannot save"),
    "disk, on rank 0": lambda: on_main(fails_on({0}, FULL), doing="cannot save"),
    "stopped, on two": lambda: agreed(
        fails_on({1, 2}, RunStopped("enough", ExitCode.HANG)), doing="start"
    ),
    "nested": lambda: agreed(lambda: on_main(fails_on({0}, ConfigError("b = 2"))), doing="start"),
    "unexpected": lambda: agreed(fails_on({1}, KeyError("x"))),
    "facts": lambda: require_equal({"seed": min(dist.get_rank(), 1), "x": 1}),
}


def _rank(rank: int, folder: str) -> None:
    """Run all cases, as each leaves the ranks in step, and note how they ended here."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    ended: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            ended[name] = ["returned", case()]
        except RunStopped as stopped:
            ended[name] = [str(stopped), stopped.code, stopped.on_all_ranks]
        except KeyError as error:
            ended[name] = ["KeyError", *error.args]
    Path(f"{folder}/{rank}.json").write_text(json.dumps(ended))
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process whose interpreter is finalized


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(folder),), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_each_rank_has_its_own_result_and_all_have_that_of_rank_0(
    ended: list[dict[str, Any]],
) -> None:
    assert [rank["each its own"] for rank in ended] == [["returned", n] for n in (0, 10, 20)]
    first = ended[0]["rank 0 for all"]
    assert first[1]["rank"] == 0
    assert [rank["rank 0 for all"] for rank in ended] == [first] * WORLD


@pytest.mark.parametrize(
    ("case", "line", "code"),
    [
        ("setting, all alike", "a = 1: use 2", ExitCode.CONFIG),
        ("setting, on one", "rank 2: start: a = 1: use 2", ExitCode.CONFIG),
        (
            "disk, on one",
            "rank 1: cannot save: No space left on device (there)",
            ExitCode.STORAGE,
        ),
        (
            "disk, on rank 0",
            "cannot save: No space left on device (there)",
            ExitCode.STORAGE,
        ),
        ("stopped, on two", "rank 1: enough", ExitCode.HANG),
        ("nested", "b = 2", ExitCode.CONFIG),
    ],
)
def test_an_error_of_any_rank_ends_all_with_the_same_line_and_code(
    case: str, line: str, code: ExitCode, ended: list[dict[str, Any]]
) -> None:
    assert [rank[case] for rank in ended] == [[line, code, True]] * WORLD


def test_an_unexpected_error_is_itself_where_it_happened_and_ends_the_others(
    ended: list[dict[str, Any]],
) -> None:
    other = ["rank 1: KeyError: 'x'", ExitCode.FAILED, False]
    assert [rank["unexpected"] for rank in ended] == [other, ["KeyError", "x"], other]


def test_facts_that_differ_are_named_with_both_values(ended: list[dict[str, Any]]) -> None:
    line = "rank 1: seed = 1 here, 0 on rank 0: start all ranks with the same settings"
    assert {rank["facts"][1] for rank in ended} == {ExitCode.CONFIG}
    assert all(rank["facts"][0].startswith(line) for rank in ended)
