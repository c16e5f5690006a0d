"""A real sshd for a test, with its own keys and settings, and a client's settings for it."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import kolotune

from .waiting import free_port, wait_until

_SOURCE = Path(kolotune.__file__).parents[1]
ALIAS = "the-same"
"""Another name of the first server's host."""
_KEPT = ("KOLOTUNE_CACHE", "OMP_NUM_THREADS")


def skip_reason() -> str:
    """Return why there can be no server here; "" when there can."""
    missing = [name for name in ("/usr/sbin/sshd", "ssh", "ssh-keygen") if shutil.which(name) is None]
    return f"{', '.join(missing)} is not installed" if missing else ""


@dataclass(frozen=True)
class Server:
    """A running sshd.

    Attributes:
        config: settings for ``ssh -F``.
        name: of the host in them.
        process: the server's process id.
    """

    config: Path
    name: str
    process: int

    def connections(self) -> list[int]:
        """Return the processes that serve connections."""
        children = Path(f"/proc/{self.process}/task/{self.process}/children").read_text(encoding="ascii")
        return [int(number) for number in children.split()]


@contextlib.contextmanager
def ssh_server(folder: Path, *, address: str = "127.0.0.1", inside: Sequence[str] = ()) -> Iterator[Server]:
    """Run a server that accepts the key in `folder`, while the block runs.

    Args:
        folder: for keys, settings and the log. It may be that of another server; the client's settings then have both.
        address: where it listens.
        inside: the command prefix that runs a program on the host with this address.
    """
    folder.mkdir(exist_ok=True)
    for name in ("host_key", "user_key"):
        if not (folder / name).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copyfile(folder / "user_key.pub", folder / "authorized")
    port = free_port() if not inside else 2222
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd drops its privileges
    variables = {"PYTHONPATH": str(_SOURCE), **{name: os.environ[name] for name in _KEPT if name in os.environ}}
    environment = " ".join(f'"{name}={value}"' for name, value in variables.items())
    settings = folder / f"sshd_config_{address}"
    settings.write_text(
        f"ListenAddress {address}\nPort {port}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nMaxStartups 100\nPermitRootLogin yes\n"
        f"SetEnv {environment}\n"
    )
    key = (folder / "host_key.pub").read_text(encoding="ascii").strip()
    with (folder / "known_hosts").open("a", encoding="ascii") as known:
        known.write(f"[{address}]:{port} {key}\n")
    with (folder / "config").open("a", encoding="ascii") as client:
        client.write(
            f"Host {address} {ALIAS}\n  HostName {address}\n  Port {port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {folder}/user_key\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking yes\n"
        )
    with (folder / f"log_{address}").open("ab") as log:
        server = subprocess.Popen([*inside, "/usr/sbin/sshd", "-D", "-e", "-f", settings], stderr=log, stdout=log)
    try:
        wait_until(lambda: server.poll() is not None or _answers(address, port, inside), "sshd did not start")
        assert server.poll() is None, "sshd has ended"
        yield Server(folder / "config", address, server.pid)
    finally:
        server.terminate()
        server.wait()


def _answers(address: str, port: int, inside: Sequence[str]) -> bool:
    argv = [*inside, "ssh-keyscan", "-p", str(port), "-t", "ed25519", address]
    return bool(subprocess.run(argv, capture_output=True).stdout.strip())
