"""tools/doctor.py: each check says what is wrong and what to do, and the tool's exit code says
whether anything is.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections import namedtuple
from importlib import import_module
from pathlib import Path

import doctor
import pytest
from machine import gpus, hosts, services, software, storage
from machine.findings import PROBE_PREFIX, Finding, Status, examine, table

from tests.support.processes import RANK_VARIABLES, ROOT
from tests.support.tiny_run import TIMEOUT_S, environment

PYTHON = Path(sys.executable)
OK, WARN, FAIL = Status
Usage = namedtuple("Usage", "total used free")


def statuses(findings):
    return [finding.status for finding in findings]


def only(findings, status):
    """The only finding, of that status; what is not ok says what to do."""
    (finding,) = findings
    assert finding.status is status, finding
    assert finding.fix or status is OK
    return finding


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_table_shows_what_to_fix_and_counts():
    text = table([Finding(OK, "python", "3.12"), Finding(FAIL, "disk", "full", "delete something")])
    assert text.splitlines() == [
        "ok    python  3.12",
        "fail  disk    full",
        "              -> delete something",
        "1 ok, 0 warnings, 1 failures",
    ]


def test_a_check_that_breaks_is_a_failure_and_the_others_still_run():
    def breaks():
        raise RuntimeError("no\nluck")

    broken, fine = examine([("first", breaks), ("second", lambda: [Finding(OK, "second", "fine")])])
    assert (broken.status, broken.subject, broken.found) == (
        FAIL,
        "first",
        "the check failed with RuntimeError: no luck",
    )
    assert fine.status is OK


def pretend_disk(monkeypatch, *, free=10**12, speed=500.0):
    """A disk with this much free space and speed, whatever is written to the one that is there."""
    written = storage._write_speed
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage(10**13, 0, free))
    monkeypatch.setattr(
        storage, "_write_speed", lambda folder: speed if written(folder) > 0 else 0.0
    )


def test_a_folder_is_tried_by_writing_and_left_as_it_was(tmp_path, monkeypatch):
    pretend_disk(monkeypatch)
    folder = tmp_path / "not" / "yet"
    found = only(storage.check_folder(folder, "run folder"), OK).found
    assert found == f"{folder}: 1,000 GB free, writes 500 MB/s"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_fails():
    found = only(storage.check_folder(Path("/proc/none"), "run folder"), FAIL).found
    assert found.startswith("/proc/none cannot be written")


@pytest.mark.parametrize(
    ("free", "speed", "status"),
    [(10**12, 500.0, OK), (10**12, 5.0, WARN), (10**10, 500.0, WARN), (10**8, 500.0, FAIL)],
)
def test_little_space_and_slow_writing_are_told(tmp_path, monkeypatch, free, speed, status):
    pretend_disk(monkeypatch, free=free, speed=speed)
    only(storage.check_folder(tmp_path, "run folder"), status)


def test_a_file_system_without_locks_fails(tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    assert (
        "hard links, which locks need, do not work"
        in only(storage.check_folder(tmp_path, "cache folder"), FAIL).found
    )


def test_versions_outside_the_supported_ranges_are_named(monkeypatch):
    monkeypatch.setattr(software.metadata, "requires", lambda name: ["torch>=2", "pytest>=1"])
    assert only(software.check_packages(), OK).found.startswith("torch 2")
    wanted = ["torch<1.0", "surely-not-installed>=2", 'pytest<1; extra == "dev"']
    monkeypatch.setattr(software.metadata, "requires", lambda name: wanted)
    found = only(software.check_packages(), FAIL).found
    assert "torch 2" in found
    assert "surely-not-installed missing (needs >=2)" in found
    assert "pytest" not in found


def test_requirements_are_unknown_where_nothing_is_installed(monkeypatch):
    def requires(name):
        raise software.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(software.metadata, "requires", requires)
    unknown, shown = software.check_packages()
    assert (unknown.status, unknown.found[:22]) == (WARN, "mc_ds is not installed")
    assert (shown.status, shown.found[:7]) == (OK, "torch 2")


def test_the_libraries_of_this_environment_work():
    for check in (software.check_python, software.check_deepspeed, software.check_tokenizer):
        only(check(), OK)


def test_bytecode_that_is_never_kept_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "a" / "b"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert not list(software.check_bytecode()), "the first import will write it"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = only(software.check_bytecode(), WARN).found
    path = Path(found.split()[0])
    assert path.is_relative_to(tmp_path)
    assert path.name.startswith("__init__.cpython")
    path.parent.mkdir(parents=True)
    path.touch()
    assert not list(software.check_bytecode()), "it is there, however it came"
    path.unlink()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(software.os, "access", lambda folder, mode: folder != path.parent)
    only(software.check_bytecode(), WARN)


@pytest.mark.parametrize("change", [-8, 8])
def test_the_tokenizer_of_the_check_can_be_trained_by_other_versions(monkeypatch, change):
    """Versions of sentencepiece differ by a few in how many pieces a text gives."""
    monkeypatch.setattr(software, "PIECES", software.PIECES + change)
    only(software.check_tokenizer(), OK)


def test_a_compiler_that_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = only(software.check_compiler(), WARN).found
    assert found.startswith("a C++ compiler missing: torch.compile will fail")
    program(tmp_path, "g++", "")
    assert only(software.check_compiler(), OK).found.startswith("g++")


def test_a_driver_without_a_gpu_in_torch_fails_and_no_driver_is_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "CPU" in only(gpus.check_gpus(), WARN).found
    program(tmp_path, "nvidia-smi", "echo 580.1")
    assert "driver 580.1 works" in only(gpus.check_gpus(), FAIL).found


def pretend_gpus(monkeypatch, *, names=("H100", "H100"), in_use=0.01, bf16=True, peers=True):
    answers = {
        "is_available": True,
        "device_count": len(names),
        "is_bf16_supported": bf16,
        "can_device_access_peer": peers,
        "mem_get_info": (int(80e9 * (1 - in_use)), int(80e9)),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *args, answer=answer, **kwargs: answer)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: names[index])
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 27, 5))


@pytest.mark.parametrize(
    ("gpu", "warning"),
    [
        (dict(names=("H100", "A100")), "different models (H100, A100)"),
        (dict(names=("H100",), in_use=0.5), "GPU 0 has 37.3 of 74.5 GiB in use"),
        (dict(bf16=False), "does not support bfloat16"),
        (dict(peers=False), "cannot access the memory of the others"),
    ],
)
def test_gpus_that_would_slow_a_run_or_break_it(monkeypatch, gpu, warning):
    pretend_gpus(monkeypatch)
    assert "2 x H100" in only(gpus.check_gpus(), OK).found
    pretend_gpus(monkeypatch, **gpu)
    whole, wrong = gpus.check_gpus()
    assert whole.status is OK
    assert "NCCL 2.27.5" in whole.found
    assert wrong.status is WARN
    assert warning in wrong.found


@pytest.fixture
def wandb_installed(monkeypatch):
    """Whether it is or not: these checks ask for nothing else of it."""
    found = services.find_spec
    monkeypatch.setattr(services, "find_spec", lambda name: name == "wandb" or found(name))


def test_weights_and_biases_may_be_missing(monkeypatch):
    monkeypatch.setattr(services, "find_spec", lambda name: None)
    found = only(services.check_wandb({"WANDB_MODE": "offline"}), WARN).found
    assert found == "not installed: metrics will only be in metrics.jsonl"


@pytest.mark.usefixtures("wandb_installed")
@pytest.mark.parametrize(
    ("environ", "status", "found"),
    [
        ({"WANDB_MODE": "offline"}, OK, "offline"),
        ({"WANDB_MODE": "disabled"}, OK, "disabled"),
        ({"NETRC": "/none"}, OK, "offline (no key)"),
        ({"WANDB_MODE": "sometimes"}, FAIL, "WANDB_MODE = 'sometimes'"),
        (
            {"WANDB_API_KEY": "k", "WANDB_BASE_URL": "http://127.0.0.1:1"},
            WARN,
            "127.0.0.1:1 cannot be reached",
        ),
    ],
)
def test_the_mode_of_weights_and_biases(environ, status, found):
    assert found in only(services.check_wandb(environ), status).found


@pytest.mark.usefixtures("wandb_installed")
def test_a_server_of_weights_and_biases_that_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        base = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert (
            "answers"
            in only(services.check_wandb({"WANDB_API_KEY": "k", "WANDB_BASE_URL": base}), OK).found
        )


def test_slurm_missing_silent_and_in_a_hurry(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "COMMAND_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(services.check_slurm(), OK).found.startswith("not installed here: use deepspeed")
    program(tmp_path, "sbatch", "")
    assert "scontrol does not answer" in only(services.check_slurm(), WARN).found
    program(tmp_path, "scontrol", "echo unable to contact >&2; exit 1")
    assert "unable to contact" in only(services.check_slurm(), WARN).found
    program(tmp_path, "sinfo", "echo 'gpu* 4 idle gpu:8'")
    program(
        tmp_path, "scontrol", "echo 'SLURM_VERSION = 23.02'; echo 'KillWait                = 5 sec'"
    )
    cluster, hurry = services.check_slurm()
    assert cluster == Finding(OK, "slurm", "23.02: gpu* 4 idle gpu:8")
    assert (hurry.status, "5 s after TERM" in hurry.found) == (WARN, True)


def report(**changes):
    facts = [{"torch": "2.13.0"}, {"torch": "2.13.0"}]
    return {
        "hosts": ["a", "b"],
        "facts": facts,
        "backend": "nccl",
        "correct": True,
        "latency_ms": 0.1,
        "gb_per_s": 100.0,
        **changes,
    }


def test_what_a_round_trip_says():
    assert "nccl, 2 ranks on 2 hosts" in only(hosts.assess(report()), OK).found
    assert "sum over the ranks is wrong" in only(hosts.assess(report(correct=False)), FAIL).found
    assert "NCCL_SOCKET_IFNAME" in only(hosts.assess(report(gb_per_s=0.1)), WARN).fix
    one = report(hosts=["a"], facts=[{"torch": "2.13.0"}], gb_per_s=0.0)
    only(hosts.assess(one), OK)
    speed, differs = hosts.assess(report(facts=[{"torch": "2.13.0"}, {"torch": "2.11.0"}]))
    assert speed.status is OK
    assert (differs.status, differs.found) == (FAIL, "torch differs: 2.13.0 on a, 2.11.0 on b")


def test_hosts_that_cannot_be_asked(tmp_path, monkeypatch):
    assert "is missing or has no hosts" in only(hosts.check_hostfile(tmp_path / "none"), FAIL).found
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("nobody.invalid slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "pdsh is missing" in only(hosts.check_hostfile(hostfile), FAIL).found
    program(tmp_path, "pdsh", "")
    program(tmp_path, "ssh", "echo no route >&2; exit 255")
    assert only(hosts.check_hostfile(hostfile), FAIL).found == "nobody.invalid: no route"


def test_hosts_are_visited_by_the_launcher_of_this_interpreter(tmp_path, monkeypatch):
    """Where modules or PYTHONPATH make packages known, `deepspeed` may be no program."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("one slots=2\ntwo slots=2\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("pdsh", "ssh"):
        program(tmp_path, name, "")

    def run(command, environ=None):
        module = command[command.index("-m") + 1]
        assert (Path(command[0]), callable(import_module(module).main)) == (PYTHON, True)
        return f"{PROBE_PREFIX}{json.dumps(report())}"

    monkeypatch.setattr(hosts, "_run", run)
    assert statuses(hosts.check_hostfile(hostfile, "one")) == [OK, OK]


def test_ranks_that_do_not_meet_are_quoted(monkeypatch):
    monkeypatch.setattr(
        hosts,
        "_run",
        lambda command, environ: "noise\nerror: rank 1 of 2 did not meet the others\n",
    )
    assert "error: rank 1 of 2 did not meet the others" in only(hosts.check_local(), FAIL).found


def test_the_tool_examines_everything_and_the_ranks_meet(tmp_path, monkeypatch, capsys):
    """What differs between machines is pretended: packages, GPUs and the disk."""
    for name in (*RANK_VARIABLES, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("packages", "gpus"):
        monkeypatch.setattr(doctor, f"check_{name}", lambda name=name: [Finding(OK, name, "fine")])
    monkeypatch.setattr(hosts, "TIMEOUT_S", TIMEOUT_S)
    pretend_disk(monkeypatch)
    folders = ["--cache_dir", str(tmp_path), "--run_dir", str(tmp_path)]
    assert doctor.main(folders) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ok    round trip     gloo, 2 ranks on 1 hosts", said, re.MULTILINE), said
    subjects = "python packages deepspeed gpus run.folder cache.folder sentencepiece wandb slurm"
    for subject in subjects.split():
        assert re.search(rf"^(ok|warn)  +{subject} ", said, re.MULTILINE), said
    monkeypatch.setattr(doctor, "check_packages", lambda: [Finding(FAIL, "packages", "old", "new")])
    monkeypatch.setattr(doctor, "check_local", lambda: [Finding(OK, "round trip", "fine")])
    assert doctor.main(folders) == 1


def test_the_command_names_a_folder_that_cannot_be_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "tools/doctor.py", "--cache_dir", tmp_path, "--run_dir", "/proc/none"],
        cwd=ROOT,
        env=environment(tmp_path) | {"WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"^fail  run folder +/proc/none cannot be written", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("ranks", [1, 2])
def test_under_a_launcher_its_ranks_are_the_ones_that_meet(tmp_path, ranks):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    command = [*launcher, "tools/doctor.py", "--probe"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(PROBE_PREFIX)]
    found = json.loads(line.removeprefix(PROBE_PREFIX))
    assert (len(found["hosts"]), found["backend"], found["correct"]) == (ranks, "gloo", True)
