"""A kill at every system call by which a process changes files of a folder, by strace."""

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
    """The `count`-th call of that name on a path in one process."""

    call: str
    path: str
    count: int


def why_not() -> str:
    """Why there is no tracing here; "" where there is."""
    if shutil.which("strace") is None:
        return "needs strace: apt-get install strace"
    done = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"tracing is not allowed here: {done.stderr.strip()}"


def attach(pid: int, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """strace on a process and on all that it will start; returns when it has it."""
    log.unlink(missing_ok=True)
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-p", str(pid), "-o", str(log), *options], stderr=subprocess.PIPE)
    while f"TracerPid:\t{tracer.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
        assert tracer.poll() is None, tracer.stderr.read() if tracer.stderr else ""
        time.sleep(0.002)
    return tracer


def points_in(log: Path, folder: Path) -> list[Point]:
    """The calls of a recorded run that change something in the folder, in their order."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found: dict[Point, None] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        parts = re.match(r"(\d+) +(\w+)\((.*)", line)
        if parts is None:
            continue
        process, call, rest = parts.groups()
        paths = [each for each in re.findall(r'[<"](/[^>"]*)[>"]', rest) if Path(each).is_relative_to(folder)]
        for path in dict.fromkeys(paths):
            seen[process, call, path] += 1
        changes = not call.startswith("open") or "O_CREAT" in rest or "O_TRUNC" in rest
        if paths and changes:
            found[Point(call, paths[0], seen[process, call, paths[0]])] = None
    return list(found)


def recording() -> list[str]:
    """Options of strace that show what `points_in` reads."""
    return ["-y", "-e", f"trace={','.join(CALLS)}"]


def killing(point: Point) -> list[str]:
    """Options of strace that kill at the point, before the call does anything."""
    inject = f"inject={point.call}:signal=KILL:when={point.count}"
    return ["-e", f"trace={point.call}", "-P", point.path, "-e", inject]


def hit(log: Path) -> bool:
    """Whether the kill came."""
    return log.is_file() and _KILLED in log.read_text(encoding="utf-8", errors="replace")


def log_of(folder: Path) -> Path:
    """Where strace writes, beside the folder that is looked at."""
    return folder.with_name(f"{folder.name}.strace")


def at_every_call(
    folder: Path,
    start: Callable[[], int],
    wait: Callable[[int], None],
    prepare: Callable[[], None],
    check: Callable[[Point], None],
    choose: Callable[[Sequence[Point]], Sequence[Point]] = lambda points: points,
) -> tuple[int, int]:
    """Kills at each point, once each.

    Args:
        folder: whose changes count.
        start: starts the process, which waits to be traced; returns its number.
        wait: waits for its end and that of all it started, and ends what is left over.
        prepare: puts the folder back to what it was before.
        check: called after each kill.
        choose: of the points that there are.

    Returns:
        The number of points that were chosen, and of those at which a process was killed.
    """
    log = log_of(folder)
    prepare()
    _traced(start, wait, log, recording())
    points = choose(points_in(log, folder))
    hits = 0
    for point in points:
        prepare()
        _traced(start, wait, log, killing(point))
        hits += hit(log)
        check(point)
    return len(points), hits


def _traced(start: Callable[[], int], wait: Callable[[int], None], log: Path, options: list[str]) -> None:
    pid = start()
    tracer = attach(pid, log, *options)
    wait(pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        tracer.wait(10)
    tracer.kill()
    tracer.wait()
