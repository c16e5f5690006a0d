"""Arguments and environment variables for PyTorch's torchrun, which starts an engine's processes on this machine.

When a process ends too early, or a lost machine returns, torchrun restarts all of them.
"""

from __future__ import annotations

import os
import socket

from kolotune.foundation.errors import TrainingError
from kolotune.foundation.hardware import cores

from .job import TrainJob

_RESTARTS = 3
_WAIT_SECONDS = 3600  # for the other machines, at the start and after one was lost
_STORE_SECONDS = 600  # for the machine with the rendezvous address
_JOIN_SECONDS = 5  # for more machines than configured: there are none


def arguments(job: TrainJob, module: str, module_argument: str) -> list[str]:
    """Return torchrun's arguments for the job's processes on this machine.

    Args:
        job: its processes, machines and rendezvous address count.
        module: run by each process.
        module_argument: passed to the module.

    Raises:
        TrainingError: the rendezvous address is invalid or unreachable.
    """
    chosen = [f"--nproc-per-node={job.nproc}", f"--max-restarts={_RESTARTS}"]
    if job.nnodes == 1:
        chosen.append("--standalone")
    else:
        host, port = _rendezvous(job.rdzv or "")
        here, there = _addresses(host, port)
        # The machine with that address keeps the store; by default torchrun compares host names.
        conf = (
            f"is_host={int(here == there)},join_timeout={_WAIT_SECONDS},last_call_timeout={_JOIN_SECONDS},"
            f"read_timeout={_STORE_SECONDS}"
        )
        chosen += [
            f"--nnodes={job.nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}",
            f"--rdzv-id={job.data_sha256[:16]}", f"--rdzv-conf={conf}", f"--local-addr={here}",
        ]  # fmt: skip
    return [*chosen, "--module", module, module_argument]


def variables(job: TrainJob) -> dict[str, str]:
    """Return environment variables for torchrun and its processes, without those that the user has set.

    Raises:
        TrainingError: as in `arguments`.
    """
    chosen = {"OMP_NUM_THREADS": str(max(1, cores() // job.nproc))}
    if job.nnodes > 1:
        chosen["GLOO_SOCKET_IFNAME"] = _interface_of(_addresses(*_rendezvous(job.rdzv or ""))[0])
    kept = {name: value for name, value in chosen.items() if name not in os.environ}
    # Each start gets a separate store. In a shared one (torch 2.13) restarted processes find the addresses of their
    # predecessors and wait for each other, and a machine that returns waits for an address that is sent only once.
    return {**kept, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _rendezvous(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise TrainingError(f"rdzv: {text!r} is not HOST:PORT", "Give the address of one of the machines.")
    return host, int(port)


def _addresses(host: str, port: int) -> tuple[str, str]:
    """Return this machine's address on the route to `host`, and that of `host`; nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0]), str(address[0])
    except OSError as error:
        raise TrainingError(
            f"rdzv: there is no route from here to {host}: {error.strerror or error}",
            "Give an address of one of the machines that all of them can reach.",
        ) from None


def _interface_of(address: str) -> str:
    """Return the network interface that has an address; "" when none has."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    return ""
