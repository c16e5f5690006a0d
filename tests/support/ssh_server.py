"""A real sshd, for as long as a test: its own keys and settings, and a client's settings for it."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import kolotune

_SOURCE = Path(kolotune.__file__).parents[1]
ALIAS = "the-same"
"""Another name of the first server's host."""
_KEPT = ("KOLOTUNE_CACHE", "OMP_NUM_THREADS")


def why_not() -> str:
    """Why there can be no server here; "" when there can."""
    missing = [name for name in ("/usr/sbin/sshd", "ssh", "ssh-keygen") if shutil.which(name) is None]
    return f"{', '.join(missing)} is not installed" if missing else ""


@dataclass(frozen=True)
class Server:
    """A running sshd.

    Attributes:
        config: settings for ``ssh -F`` that know it by its name.
        name: of the host in them.
        process: the server's number.
    """

    config: Path
    name: str
    process: int

    def connections(self) -> list[int]:
        """The processes that serve a connection now."""
        children = Path(f"/proc/{self.process}/task/{self.process}/children").read_text(encoding="ascii")
        return [int(each) for each in children.split()]


@contextlib.contextmanager
def ssh_server(folder: Path, *, address: str = "127.0.0.1", inside: Sequence[str] = ()) -> Iterator[Server]:
    """Starts a server, which lets in whoever has the key in `folder`.

    Args:
        folder: for keys, settings and the log; made, or that of a server before, whose client's settings are added to.
        address: where it listens.
        inside: what starts a program on the host that has this address.
    """
    folder.mkdir(exist_ok=True)
    for name in ("host_key", "user_key"):
        if not (folder / name).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copyfile(folder / "user_key.pub", folder / "authorized")
    port = _free_port() if not inside else 2222
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd parts with its rights
    variables = {"PYTHONPATH": str(_SOURCE), **{name: os.environ[name] for name in _KEPT if name in os.environ}}
    told = " ".join(f'"{name}={value}"' for name, value in variables.items())
    settings = folder / f"sshd_config_{address}"
    settings.write_text(
        f"ListenAddress {address}\nPort {port}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nMaxStartups 100\nPermitRootLogin yes\n"
        f"SetEnv {told}\n"
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
        _wait(address, port, server, inside)
        yield Server(folder / "config", address, server.pid)
    finally:
        server.terminate()
        server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(address: str, port: int, server: subprocess.Popen[bytes], inside: Sequence[str]) -> None:
    deadline = time.monotonic() + 30
    while True:
        assert server.poll() is None and time.monotonic() < deadline, "sshd did not start"
        asked = subprocess.run([*inside, "ssh-keyscan", "-p", str(port), "-t", "ed25519", address], capture_output=True)
        if asked.stdout.strip():
            return
        time.sleep(0.1)
