"""Several processes of the engine, on this machine and others, by PyTorch's torchrun.

When one of them ends before its time, or a machine comes back, torchrun starts all of them again, and they go on from
the newest checkpoint that any machine has.
"""

from __future__ import annotations

import os
import socket

from ... import hardware
from ...errors import TrainingError
from ...runners.watchdog import WATCH_STDIN
from ..job import TrainJob
from .environment import LEAN

_KILLS_BEFORE = "KOLOTUNE_KILLS_BEFORE"
_RESTARTS = 3
_WAIT_SECONDS = 3600  # for the other machines, at the beginning and after one of them was lost
_STORE_SECONDS = 600  # for the machine where they meet to be there
_JOIN_SECONDS = 5  # for a machine more than was asked for: there is none


def is_wanted(job: TrainJob) -> bool:
    """Whether several processes train, and this is none of them."""
    return job.nproc * job.nnodes > 1 and "RANK" not in os.environ


def one_was_killed_for_memory() -> bool:
    """Whether torchrun has started this process anew, and the kernel has killed one since it began: likely one of ours.

    It would be killed again, for the same reason.
    """
    before = os.environ.get(_KILLS_BEFORE, "")
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return again and before.isdecimal() and hardware.kills_for_memory(own=True) != int(before)


def launch(job: TrainJob, job_file: str, *, watched: bool) -> int:
    """Starts the job's processes of this machine and waits for their end; returns the exit code.

    Args:
        job: in the file `job_file`.
        watched: whether the end of standard input is the end of this process, and so of those.

    Raises:
        TrainingError: the address where machines meet can't be made out.
    """
    from . import checkpoints

    if not job.resume:  # here, once: a process that is started again finds what was trained since
        checkpoints.clear(job)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // job.nproc)))
    if job.sharded:
        os.environ.update(LEAN)
    os.environ[WATCH_STDIN] = str(int(watched))
    os.environ[_KILLS_BEFORE] = str(hardware.kills_for_memory(own=True))
    # A store of its own for each start. In a shared one (torch 2.13) processes that are started again find addresses of
    # those before them and wait for each other, and a machine that comes back waits for one that is told once.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    from torch.distributed import run

    try:
        run.main(arguments(job, job_file))
    except Exception as error:
        if type(error).__name__ not in ("ChildFailedError", "RendezvousTimeoutError", "RendezvousConnectionError"):
            raise
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return 1
    return 0


def arguments(job: TrainJob, job_file: str) -> list[str]:
    """What torchrun is given.

    Raises:
        TrainingError: see `_meeting_place`.
    """
    chosen = [f"--nproc-per-node={job.nproc}", f"--max-restarts={_RESTARTS}"]
    if job.nnodes == 1:
        chosen.append("--standalone")
    else:
        host, port = _meeting_place(job.rdzv or "")
        here, there = _addresses(host, port)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_of(here))
        # Whose address it is keeps the store: torchrun alone would go by host names.
        conf = (
            f"is_host={int(here == there)},join_timeout={_WAIT_SECONDS},last_call_timeout={_JOIN_SECONDS},"
            f"read_timeout={_STORE_SECONDS}"
        )
        chosen += [
            f"--nnodes={job.nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}",
            f"--rdzv-id={job.data_sha256[:16]}", f"--rdzv-conf={conf}", f"--local-addr={here}",
        ]  # fmt: skip
    return [*chosen, "--module", "kolotune.engines.native", job_file]


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
