"""A real Slurm of one or two machines for a test: munge, slurmctld, and a slurmd on each host."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .hosts import Host
from .waiting import free_port, wait_until


def skip_reason() -> str:
    """Return why Slurm can't run here; "" when it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "Slurm's daemons need root"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "nsenter") if shutil.which(name) is None]
    return f"{', '.join(missing)} is not installed" if missing else ""


@dataclass(frozen=True)
class Cluster:
    """A running Slurm.

    Attributes:
        folder: its state and logs.
        env: variables for its programs.
        inside: the command prefix that runs a program on its first machine.
    """

    folder: Path
    env: dict[str, str]
    inside: Sequence[str] = field(default_factory=list)

    def run(self, *command: str) -> str:
        """Run one of Slurm's programs; return its output."""
        argv = [*self.inside, *command]
        return subprocess.run(argv, env={**os.environ, **self.env}, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def slurm_cluster(hosts: Sequence[Host] = ()) -> Iterator[Cluster]:
    """Run Slurm while the block runs.

    Args:
        hosts: its machines; empty: this one.
    """
    # In a test's own folder the paths of its sockets would be too long.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        yield from _running(Path(folder), hosts)


def _running(folder: Path, hosts: Sequence[Host]) -> Iterator[Cluster]:
    for name in ("state", "run"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    # Machines are named by their addresses, which need not be resolved.
    named = [host.address for host in hosts] or ["127.0.0.1"]
    config = folder / "slurm.conf"
    config.write_text(_settings(folder, named), encoding="ascii")
    first = _inside(hosts[0]) if hosts else []
    with contextlib.ExitStack() as stack:
        start = _starter(stack, folder)
        start("munged", [
            "munged", "--force", "--foreground", f"--socket={folder}/run/munge", f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
        ])  # fmt: skip
        wait_until((folder / "run" / "munge").exists, "munge did not start")
        start("slurmctld", [*first, "slurmctld", "-D", "-f", str(config)])
        for at, name in enumerate(named):
            start(
                f"slurmd-{name}",
                [*(_inside(hosts[at]) if hosts else ()), "slurmd", "-D", "-N", name, "-f", str(config)],
            )
        cluster = Cluster(folder, {"SLURM_CONF": str(config)}, first)
        wait_until(lambda: _idle(cluster) == len(named), "Slurm did not start")
        try:
            yield cluster
        finally:
            cluster.run("scancel", "--user=root")


def _idle(cluster: Cluster) -> int:
    """Return the number of idle machines; 0 while Slurm does not answer."""
    with contextlib.suppress(subprocess.CalledProcessError):
        return sum(map(int, cluster.run("sinfo", "--noheader", "--format=%D", "--states=idle").split()))
    return 0


def _settings(folder: Path, named: Sequence[str]) -> str:
    ports = [free_port(), free_port()] if len(named) == 1 else [16817, 16818]
    lines = [
        "ClusterName=tests", f"SlurmctldHost={socket.gethostname()}({named[0]})", "SlurmUser=root", "SlurmdUser=root",
        "AuthType=auth/munge", f"AuthInfo=socket={folder}/run/munge", "CredType=cred/munge",
        f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool-%n", f"SlurmctldPidFile={folder}/ctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid", f"SlurmctldPort={ports[0]}", f"SlurmdPort={ports[1]}",
        "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core", "JobAcctGatherType=jobacct_gather/none", "MpiDefault=none",
        "ReturnToService=2", "KillWait=15", "SchedulerParameters=batch_sched_delay=0",
        *[f"NodeName={name} NodeAddr={name} CPUs={os.cpu_count()} State=UNKNOWN" for name in named],
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _inside(host: Host) -> list[str]:
    """Return the prefix for a program on a host. It keeps /sys: `ip netns exec` would hide the cgroups from slurmd."""
    return ["nsenter", f"--net=/run/netns/{host.name}"]


def _starter(stack: contextlib.ExitStack, folder: Path) -> Callable[[str, list[str]], None]:
    def start(name: str, argv: list[str]) -> None:
        log = stack.enter_context((folder / f"{name}.out").open("ab"))
        daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        stack.callback(_end, daemon)

    return start


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
