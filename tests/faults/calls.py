"""Kill a process at each system call by which it changes files of a folder, with strace."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

CALLS = (
    "write", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink", "unlinkat",
    "rmdir", "mkdir", "mkdirat", "ftruncate", "truncate", "link", "linkat", "symlink", "copy_file_range", "sendfile",
    "fallocate", "openat", "open", "creat",
)  # fmt: skip
_KILLED = "+++ killed by SIGKILL +++"


@dataclass(frozen=True)
class Point:
    """The `count`-th call with this name on a path in one process."""

    call: str
    path: str
    count: int


def skip_reason() -> str:
    """Return why tracing is not possible here; "" when it is."""
    if shutil.which("strace") is None:
        return "needs strace: apt-get install strace"
    done = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"tracing is not allowed here: {done.stderr.strip()}"


def attach(pid: int, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """Attach strace to a process and to all that it will start; return when it is attached."""
    log.unlink(missing_ok=True)
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-p", str(pid), "-o", str(log), *options], stderr=subprocess.PIPE)
    while f"TracerPid:\t{tracer.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
        assert tracer.poll() is None, tracer.stderr.read() if tracer.stderr else ""
        time.sleep(0.002)
    return tracer


def points_in(log: Path, folder: Path) -> list[Point]:
    """Return the calls of a recorded run that change something in the folder, in order."""
    counts: Counter[tuple[str, str, str]] = Counter()
    points: dict[Point, None] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        parts = re.match(r"(\d+) +(\w+)\((.*)", line)
        if parts is None:
            continue
        process, call, rest = parts.groups()
        paths = [path for path in re.findall(r'[<"](/[^>"]*)[>"]', rest) if Path(path).is_relative_to(folder)]
        for path in dict.fromkeys(paths):
            counts[process, call, path] += 1
        changes = not call.startswith("open") or "O_CREAT" in rest or "O_TRUNC" in rest
        if paths and changes:
            points[Point(call, paths[0], counts[process, call, paths[0]])] = None
    return list(points)


def record_options() -> list[str]:
    """Return the options of strace for `points_in`."""
    return ["-y", "-e", f"trace={','.join(CALLS)}"]


def kill_options(point: Point) -> list[str]:
    """Return the options of strace that kill at a point, before the call does anything."""
    inject = f"inject={point.call}:signal=KILL:when={point.count}"
    return ["-e", f"trace={point.call}", "-P", point.path, "-e", inject]


def was_killed(log: Path) -> bool:
    """Whether the kill has happened."""
    return log.is_file() and _KILLED in log.read_text(encoding="utf-8", errors="replace")


def log_of(folder: Path) -> Path:
    """Return the file that strace writes, next to the traced folder."""
    return folder.with_name(f"{folder.name}.strace")


def kill_at_each_call(
    folder: Path,
    start: Callable[[], int],
    wait: Callable[[int], None],
    prepare: Callable[[], None],
    check: Callable[[Point], None],
    choose: Callable[[Sequence[Point]], Sequence[Point]] = lambda points: points,
) -> tuple[int, int]:
    """Kill once at each point.

    Args:
        folder: the folder whose changes count.
        start: starts the process, which waits to be traced; returns its id.
        wait: waits for its end and that of all its children, and kills those that remain.
        prepare: restores the folder.
        check: called after each kill.
        choose: selects some of the points.

    Returns:
        The number of selected points, and of those at which a process was killed.
    """
    log = log_of(folder)
    prepare()
    _trace(start, wait, log, record_options())
    points = choose(points_in(log, folder))
    hits = 0
    for point in points:
        prepare()
        _trace(start, wait, log, kill_options(point))
        hits += was_killed(log)
        check(point)
    return len(points), hits


def _trace(start: Callable[[], int], wait: Callable[[int], None], log: Path, options: list[str]) -> None:
    pid = start()
    tracer = attach(pid, log, *options)
    wait(pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        tracer.wait(10)
    tracer.kill()
    tracer.wait()
