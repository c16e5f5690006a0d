"""The kernel's control groups (version 1 or 2) with a memory limit, where tests may make them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")
# In version 1 and 2: the limit, the peak, the limit with swap or of swap.
_FIRST = ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.memsw.limit_in_bytes")
_SECOND = ("memory.max", "memory.peak", "memory.swap.max")


class MemoryGroup:
    """A group. A program started as ``[*group.prefix, program, …]`` runs in it, with all its children."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = _FIRST if (_ROOT / "memory" / _FIRST[0]).exists() else _SECOND
        self.prefix = ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "in-group"]

    def limit(self, size: int) -> None:
        """Set the limit in bytes, without swap."""
        (self.folder / self.names[0]).write_text(str(size))
        with contextlib.suppress(OSError):  # a kernel that does not count swap
            (self.folder / self.names[2]).write_text(str(size) if self.names is _FIRST else "0")

    @property
    def peak(self) -> int:
        """The peak of the group's memory, in bytes."""
        return int((self.folder / self.names[1]).read_text())


@pytest.fixture
def memory_group() -> Iterator[Callable[[], MemoryGroup]]:
    """Make groups; skip the test where that is not possible."""
    groups: list[MemoryGroup] = []
    root = _ROOT / "memory" if (_ROOT / "memory" / _FIRST[0]).exists() else _ROOT

    def make() -> MemoryGroup:
        folder = root / f"kolotune-test-{os.getpid()}-{len(groups)}"
        try:
            folder.mkdir()
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        groups.append(MemoryGroup(folder))
        missing = [name for name in groups[-1].names[:2] if not (folder / name).exists()]
        if missing or not os.access(folder / groups[-1].names[0], os.W_OK):
            pytest.skip(f"memory can't be limited here: {', '.join(missing) or 'the limit can not be written'}")
        return groups[-1]

    yield make
    for group in groups:
        for _ in range(100):  # it can be removed when its last process has ended
            with contextlib.suppress(OSError):
                group.folder.rmdir()
                break
            time.sleep(0.1)
