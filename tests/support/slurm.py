"""A real Slurm cluster on one host: a controller and two nodes of eight (pretended) GPUs each,
all state below one folder.
"""

import re
import secrets
from pathlib import Path

from tests.support.hosts import Host, search_path, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
GPUS = 8
CONFIG = """\
ClusterName=test
SlurmctldHost=cluster(10.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock
CredType=cred/munge
SlurmctldPort=16817
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=16 Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
NodeName=n1 NodeHostname=cluster NodeAddr=10.0.0.1 Port=17001
NodeName=n2 NodeHostname=cluster NodeAddr=10.0.0.2 Port=17002
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 PriorityTier=2
"""


class Slurm:
    """The cluster. Jobs run in `directory` with `variables`, like those of a user who submits
    from a clone.
    """

    def __init__(self, folder: Path, directory: Path, variables: dict[str, str]) -> None:
        self.folder, self.directory = folder, directory
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.0.0.1 cluster n1\n10.0.0.2 n2\n")
        self.host = Host("cluster", {Path("/etc/hosts"): folder / "hosts"})
        self.variables = variables | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": search_path(),
        }
        try:
            self._start()
        except BaseException:
            self.host.kill()
            raise

    def _start(self) -> None:
        folder = self.folder
        for address in ("10.0.0.1", "10.0.0.2"):
            self.host.run("ip", "address", "add", address, "dev", "lo")
        folder.chmod(0o755)
        for name in ("munge", "state", "spool-n1", "spool-n2", "dev"):
            (folder / name).mkdir(mode=0o755)
        for gpu in range(GPUS):
            (folder / "dev" / f"gpu{gpu}").touch()
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, gpus=GPUS))
        (folder / "gres.conf").write_text(
            f"NodeName=n[1-2] Name=gpu File={folder}/dev/gpu[0-{GPUS - 1}]\n"
        )
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        munge = {
            "key-file": key,
            **{f"{name}-file": folder / "munge" / name for name in ("pid", "log", "seed")},
        }
        sockets = f"--socket={folder}/munge/munge.sock"
        self.command(
            "munged", "--force", sockets, *(f"--{name}={path}" for name, path in munge.items())
        )
        self.command("slurmctld", "-f", folder / "slurm.conf")
        for node in ("n1", "n2"):
            self.command("slurmd", "-f", folder / "slurm.conf", "-N", node)
        wait_until(
            lambda: self.command("sinfo", "--noheader", "--format", "%t %D") == "idle 2\n",
            "two idle nodes",
            context=self._logs,
        )

    def _logs(self) -> str:
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-1500:]}"
            for path in self.folder.glob("*.log")
        )

    def command(self, *command: str | Path) -> str:
        """Runs a program as the user would, in the clone."""
        return self.host.run(*command, directory=self.directory, variables=self.variables)

    def submit(self, *arguments: str | Path) -> int:
        """The id of a new job."""
        return int(self.command("sbatch", "--parsable", *arguments).split(";")[0])

    def job(self, job: int | str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(
            re.findall(
                r"(\w+)=(\S*)", self.command("scontrol", "show", "job", "--oneliner", str(job))
            )
        )

    def wait_for(self, job: int | str, *states: str, log: Path | None = None) -> dict[str, str]:
        """The job once it is in one of the states."""

        def context() -> str:
            text = (
                log.read_text(errors="replace")[-4000:]
                if log is not None and log.exists()
                else "no log"
            )
            return f"{self.job(job)}\n{text}\n{self._logs()}"

        wait_until(
            lambda: self.job(job)["JobState"] in states,
            f"job {job} {' or '.join(states)}",
            context=context,
        )
        return self.job(job)

    def start_now(self, job: int | str) -> None:
        """A requeued job waits two minutes, because its nodes refuse it within the second in
        which it ended there; two seconds do.
        """
        self.command("scontrol", "update", f"jobid={job}", "starttime=now+2seconds")

    def close(self) -> None:
        """Ends the cluster and everything that runs on it."""
        self.host.kill()
