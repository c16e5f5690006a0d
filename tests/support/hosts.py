"""Hosts on one machine: network namespaces joined by a virtual cable. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


def skip_reason() -> str:
    """Return why there can be no hosts here; "" when there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    try:
        _ip("netns", "add", f"probe-{os.getpid()}")
        _ip("netns", "delete", f"probe-{os.getpid()}")
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made: {error.stderr.strip()}"
    return ""


@dataclass(frozen=True)
class Host:
    """A network namespace.

    Attributes:
        name: of the namespace.
        address: of its end of the cable.
        interface: name of that end.
    """

    name: str
    address: str
    interface: str

    def argv(self, *command: str) -> list[str]:
        """Return the argv that runs a command there."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(self, *command: str) -> str:
        """Run a command there; return its output."""
        return subprocess.run(self.argv(*command), check=True, capture_output=True, text=True).stdout

    def lose(self) -> None:
        """Kill all processes there."""
        for number in subprocess.check_output(["ip", "netns", "pids", self.name], text=True).split():
            os.kill(int(number), signal.SIGKILL)

    def sent(self) -> int:
        """Return how many bytes it has sent through the cable."""
        return int(self.run("cat", f"/sys/class/net/{self.interface}/statistics/tx_bytes"))

    def slow_down(self, rate: str) -> None:
        """Limit what it sends to `rate`, as tc writes it."""
        limits = ["rate", rate, "burst", "64kb", "latency", "200ms"]
        self.run("tc", "qdisc", "replace", "dev", self.interface, "root", "tbf", *limits)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts that reach each other and nothing else."""
    tag = f"{os.getpid() % 100_000}"
    hosts = tuple(Host(f"kt{side}{tag}", f"10.213.7.{at}", f"kt{side}{tag}v") for at, side in ((1, "a"), (2, "b")))
    first, second = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip(
            "link", "add", first.interface, "netns", first.name, "type", "veth",
            "peer", "name", second.interface, "netns", second.name,
        )  # fmt: skip
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in (host.interface, "lo"):
                host.run("ip", "link", "set", interface, "up")
        yield first, second
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
