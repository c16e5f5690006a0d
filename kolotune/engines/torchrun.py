"""PyTorch's torchrun, which starts an engine's processes on this machine: what it is given, and what they find set.

When one of them ends before its time, or a machine comes back, torchrun starts all of them again.
"""

from __future__ import annotations

import os
import socket

from kolotune.foundation.errors import TrainingError

from .job import TrainJob

_RESTARTS = 3
_WAIT_SECONDS = 3600  # for the other machines, at the beginning and after one of them was lost
_STORE_SECONDS = 600  # for the machine where they meet to be there
_JOIN_SECONDS = 5  # for a machine more than was asked for: there is none


def arguments(job: TrainJob, module: str, its_argument: str) -> list[str]:
    """What torchrun is given to start the job's processes of this machine.

    Args:
        job: says how many there are, and where machines meet.
        module: that each process runs.
        its_argument: that the module gets.

    Raises:
        TrainingError: the address where machines meet can't be made out.
    """
    chosen = [f"--nproc-per-node={job.nproc}", f"--max-restarts={_RESTARTS}"]
    if job.nnodes == 1:
        chosen.append("--standalone")
    else:
        host, port = _meeting_place(job.rdzv or "")
        here, there = _addresses(host, port)
        # Whose address it is keeps the store: torchrun alone would go by host names.
        conf = (
            f"is_host={int(here == there)},join_timeout={_WAIT_SECONDS},last_call_timeout={_JOIN_SECONDS},"
            f"read_timeout={_STORE_SECONDS}"
        )
        chosen += [
            f"--nnodes={job.nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}",
            f"--rdzv-id={job.data_sha256[:16]}", f"--rdzv-conf={conf}", f"--local-addr={here}",
        ]  # fmt: skip
    return [*chosen, "--module", module, its_argument]


def variables(job: TrainJob) -> dict[str, str]:
    """What torchrun and its processes must find in their environment; what the user has set stays.

    Raises:
        TrainingError: as for `arguments`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = {"OMP_NUM_THREADS": str(max(1, cores // job.nproc))}
    if job.nnodes > 1:
        chosen["GLOO_SOCKET_IFNAME"] = _interface_of(_addresses(*_meeting_place(job.rdzv or ""))[0])
    kept = {name: value for name, value in chosen.items() if name not in os.environ}
    # A store of its own for each start. In a shared one (torch 2.13) processes that are started again find addresses of
    # those before them and wait for each other, and a machine that comes back waits for one that is told once.
    return {**kept, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _meeting_place(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise TrainingError(f"rdzv: {text!r} is not of the form HOST:PORT", "Give the address of one of the machines.")
    return host, int(port)


def _addresses(host: str, port: int) -> tuple[str, str]:
    """This machine's address on the way to `host`, and that of `host`; nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0]), str(address[0])
    except OSError as error:
        raise TrainingError(
            f"rdzv: there is no way from here to {host}: {error.strerror or error}",
            "Give an address of one of the machines that all of them reach.",
        ) from None


def _interface_of(address: str) -> str:
    """The name of the network interface that has an address; "" where none has."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    return ""
