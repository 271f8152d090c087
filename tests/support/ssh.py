"""Two hosts with sshd on a cable of their own, and passwordless ssh between them, as the
deepspeed launcher needs it.
"""

import subprocess
from pathlib import Path

from tests.support.hosts import Host, connect, wait_until
from tests.support.tiny_run import TIMEOUT_S

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh")
ADDRESSES = {"host-1": "10.0.0.1", "host-2": "10.0.0.2"}
SSH = """\
Host *
    IdentityFile {key}
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ServerAliveInterval 2
    ServerAliveCountMax 2
"""
SSHD = """\
HostKey {key}
AuthorizedKeysFile {key}.pub
PidFile /run/sshd.pid
PermitRootLogin yes
StrictModes no
UsePAM no
"""


def start_hosts(folder: Path) -> list[Host]:
    """The hosts, each reaching both by name. The caller kills them."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    (folder / "ssh_config").write_text(SSH.format(key=key))
    (folder / "sshd_config").write_text(SSHD.format(key=key))
    names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    binds = {
        Path("/etc/hosts"): folder / "hosts",
        Path("/etc/ssh/ssh_config"): folder / "ssh_config",
    }
    hosts: list[Host] = []
    try:
        for name in ADDRESSES:
            hosts.append(Host(name, binds))
            hosts[-1].run("mkdir", "/run/sshd")
            hosts[-1].run("/usr/sbin/sshd", "-f", folder / "sshd_config")
        connect(*hosts, list(ADDRESSES.values()))
        for name in ADDRESSES:
            wait_until(lambda name=name: _reaches(hosts[0], name), f"ssh to {name}")
    except BaseException:
        for host in hosts:
            host.kill()
        raise
    return hosts


def _reaches(host: Host, name: str) -> bool:
    done = subprocess.run(
        host.command("ssh", "-o", "BatchMode=yes", name, "hostname"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.stdout.strip() == name
