"""launch/slurm on a real Slurm: two nodes, CPU ranks, GPUs that exist for the scheduler only.

Jobs are submitted from the clone with the shipped scripts as they are. The run's folder must
never depend on the job: every test that ends a run lets another job, or the same one requeued,
carry it on.
"""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import missing, wait_until
from tests.support.processes import ROOT
from tests.support.runs import Run, tail
from tests.support.slurm import PROGRAMS, Slurm
from tests.support.tiny_run import environment, settings

pytestmark = pytest.mark.skipif(bool(missing(*PROGRAMS)), reason=missing(*PROGRAMS))
TRAIN = "launch/slurm/train.sbatch"
STEPS = 60


class Cluster(Slurm):
    """The cluster, and a recipe for it."""

    def __init__(self, folder: Path) -> None:
        variables = environment(folder) | {"SLURM_WAIT": "5", "OMP_NUM_THREADS": "1"}
        super().__init__(folder, ROOT, variables)
        recipe = settings(
            folder,
            "recipe",
            train=dict(total_steps=STEPS),
            validation=dict(eval_interval=0),
            checkpoint=dict(interval=5),
        )
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(json.dumps(recipe))  # JSON is YAML

    def run(self, name: str) -> Run:
        """The run of that name."""
        return Run(self.folder / "runs" / name)

    def log(self, job: int | str) -> Path:
        """What the job has printed."""
        return self.folder / f"log-{job}"

    def train(
        self, *arguments: str, options: tuple[str, ...] = ("--nodes=2", "--gpus-per-node=1")
    ) -> int:
        """Submits a job of two ranks on two nodes."""
        return self.submit(
            *options, f"--output={self.folder}/log-%j", TRAIN, "--config", self.recipe, *arguments
        )

    def complete(self, job: int) -> None:
        """Waits for the job to end well."""
        state = self.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", log=self.log(job))
        assert state["JobState"] == "COMPLETED", tail(self.log(job))

    def ranks(self) -> list[int]:
        """Process ids of all trainers."""
        return self.host.scripts("launch/train.py")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


def test_the_scripts_fit_nodes_of_eight_gpus_as_they_are(cluster):
    for script in (TRAIN, "launch/slurm/evaluate.sbatch"):
        cluster.command("sbatch", "--test-only", script)


def test_outside_the_clone_a_job_says_where_to_submit(cluster):
    job = cluster.submit(
        f"--chdir={cluster.folder}", f"--output={cluster.folder}/log-%j", ROOT / TRAIN
    )
    assert cluster.wait_for(job, "FAILED")["ExitCode"] == "2:0"
    assert f"error: {cluster.folder} is not the root of the clone" in cluster.log(job).read_text()


def test_a_job_near_its_time_limit_is_requeued_and_continues_at_the_next_step(cluster):
    job, run = (
        cluster.train("--name=requeued", "--mc.num_random_variants=2"),
        cluster.run("requeued"),
    )
    run.wait_for_step(3, cluster.log(job))
    assert cluster.job(job)["NodeList"] == "n[1-2]"
    assert run.config()["mc"]["num_random_variants"] == 2
    cluster.command(
        "scancel", "--batch", "--signal=USR1", str(job)
    )  # as Slurm does before the time limit
    assert cluster.wait_for(job, "PENDING", log=cluster.log(job))["Restarts"] == "1"
    stopped, record = run.checkpoints()[0], run.record()
    assert 3 <= stopped == len(record) < STEPS
    cluster.start_now(job)
    cluster.complete(job)
    assert run.checkpoints()[0] == len(run.record()) == STEPS
    assert run.record()[:stopped] == record  # none of these steps was done again
    assert (
        "requeueing job" in cluster.log(job).read_text()
    )  # the log of the first part is still there
    assert cluster.ranks() == []


def test_a_preempted_job_saves_in_its_grace_time_and_continues_afterwards(cluster):
    job, run = cluster.train("--name=preempted"), cluster.run("preempted")
    run.wait_for_step(3, cluster.log(job))
    urgent = cluster.submit(
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        f"--output={cluster.folder}/log-%j",
        "--wrap=true",
    )
    cluster.wait_for(urgent, "COMPLETED", log=cluster.log(job))
    stopped, record = run.checkpoints()[0], run.record()
    assert stopped == len(record)
    assert cluster.wait_for(job, "PENDING", log=cluster.log(job))["Restarts"] == "1"
    cluster.start_now(job)
    cluster.complete(job)
    assert run.checkpoints()[0] == len(run.record()) == STEPS
    assert run.record()[:stopped] == record


def test_a_cancelled_job_saves_stays_cancelled_and_a_new_job_carries_its_run_on(cluster):
    job, run = cluster.train("--name=cancelled"), cluster.run("cancelled")
    run.wait_for_step(3, cluster.log(job))
    cluster.command("scancel", str(job))
    cluster.wait_for(job, "CANCELLED", log=cluster.log(job))
    wait_until(lambda: not cluster.ranks(), "the ranks to be gone")
    stopped, record = run.checkpoints()[0], run.record()
    assert stopped == len(record)
    cluster.complete(cluster.train("--name=cancelled", f"--train.total_steps={stopped + 3}"))
    assert run.checkpoints()[0] == len(run.record()) == stopped + 3
    assert run.record()[:stopped] == record
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert cluster.job(job)["Restarts"] == "0"


def test_the_death_of_a_rank_ends_the_job_and_the_next_resumes_from_the_last_checkpoint(cluster):
    job, run = cluster.train("--name=dead"), cluster.run("dead")
    run.wait_for_step(8, cluster.log(job))
    survivor, victim = cluster.ranks()
    os.kill(
        survivor, signal.SIGSTOP
    )  # it notices nothing, like one that waits in a collective of NCCL
    os.kill(victim, signal.SIGKILL)
    assert cluster.wait_for(job, "FAILED", log=cluster.log(job))["Restarts"] == "0"
    assert cluster.ranks() == []
    saved, record = run.checkpoints()[0], run.record()
    assert 5 <= saved <= len(record)
    cluster.complete(cluster.train("--name=dead", f"--train.total_steps={saved + 5}"))
    assert run.checkpoints()[0] == len(run.record()) == saved + 5
    assert run.record()[:saved] == record[:saved]


def test_every_line_of_a_job_is_whole_and_bears_its_rank(cluster):
    """The scripts call `srun --label`, which puts the rank before what stands between two ends of
    lines.
    """
    told = ("--telemetry.progress=true", "--validation.eval_interval=3")
    texts = ("--validation.continuations=2", "--name=told", "--train.total_steps=3")
    job = cluster.train(*told, *texts)
    cluster.complete(job)
    lines = cluster.log(job).read_text().removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines)
    labelled = [re.fullmatch(r"([01]): (.*)", line) for line in lines]
    assert all(labelled), lines
    assert not [line for line in lines if re.search(r"\S[01]: ", line)]
    by_rank_0 = [match[2] for match in labelled if match and match[1] == "0"]
    log = (cluster.run("told").folder / "train.log").read_text().splitlines()
    said = [line[len("2026-11-29 07:00:00  ") :] for line in log]
    assert [line for line in by_rank_0 if line in set(said)] == said
    assert said[0].startswith("run told in ")
    assert sum("the model writes" in line for line in said) == 4
    assert [line.split("  ")[0] for line in said if line.startswith("step ")][-1] == (
        "step 3/3 (100%)"
    )


def test_an_array_gives_each_task_its_own_run_and_every_setting_reaches_it(cluster):
    options = ("--nodes=1", "--gpus-per-node=1", "--array=0-1%1")
    array = cluster.train(
        "--name=seed-%a", "--seed=%a", "--mc.num_random_variants=7", "--dry_run", options=options
    )
    for index in (0, 1):
        task = f"{array}_{index}"
        number = cluster.wait_for(task, "COMPLETED")["JobId"]
        text = cluster.log(number).read_text()
        for setting in (f"name: seed-{index}", f"seed: {index}", "num_random_variants: 7"):
            assert f"0: {setting}" in text.replace("  ", "")


def test_the_doctor_lets_the_ranks_of_a_job_meet(cluster):
    doctor = (
        f"srun --ntasks-per-node=1 python tools/doctor.py --run_dir={cluster.folder}"
        f" --cache_dir={cluster.folder}"
    )
    meet = f"MASTER_ADDR=n1 MASTER_PORT=20000 {doctor}"
    job = cluster.submit("--nodes=2", f"--output={cluster.folder}/log-%j", f"--wrap={meet}")
    cluster.complete(job)
    text = cluster.log(job).read_text()
    assert "ok    round trip     gloo, 2 ranks on 1 hosts" in text  # both nodes are this host
    assert text.count(" warnings, ") == 1  # one table
    assert "gpu* 2" in text


def test_evaluation_of_a_run_is_a_job_too(cluster):
    one_rank = ("--nodes=1", "--gpus-per-node=1")
    cluster.complete(cluster.train("--name=evaluated", "--train.total_steps=3", options=one_rank))
    out = cluster.folder / "evaluation.json"
    arguments = [
        "--checkpoint",
        cluster.run("evaluated").folder,
        "--policies=recency",
        "--samples=2",
        "--out",
        out,
    ]
    job = cluster.submit(
        f"--output={cluster.folder}/log-%j", "launch/slurm/evaluate.sbatch", *arguments
    )
    cluster.complete(job)
    assert json.loads(out.read_text())
