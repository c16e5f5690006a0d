"""Commands for files inside the container, called by the client: ``python -m … COMMAND ARGUMENTS``; answers in JSON.

have PATH…          whether each of the paths exists
free FOLDER         free bytes on its disk
settle FROM TO      give sent files their final name, unless another client was faster
list FOLDER         every file below it: size, time of change in ns, inode
remove PATH         remove a file or folder, if it exists
sweep FOLDER        remove what killed clients have sent in part
sizes FOLDER        the entries of the folder and their bytes
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path


def have(*paths: str) -> list[bool]:
    return [Path(path).exists() for path in paths]


def free(folder: str) -> int:
    return shutil.disk_usage(folder).free


def settle(source: str, target: str) -> bool:
    if Path(target).exists():
        shutil.rmtree(source)
        return False
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(source).rename(target)
    return True


def list_files(folder: str) -> dict[str, list[int]]:
    root, files = Path(folder), {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            files[path.relative_to(root).as_posix()] = [status.st_size, status.st_mtime_ns, status.st_ino]
    return files


def remove(path: str) -> None:
    if Path(path).is_dir():
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def sweep(folder: str) -> None:
    for partial in Path(folder).glob(".*.partial"):
        remove(str(partial))


def sizes(folder: str) -> dict[str, int]:
    totals = {}
    for entry in sorted(Path(folder).iterdir()):
        files = [entry] if entry.is_file() else [path for path in entry.rglob("*") if path.is_file()]
        totals[entry.name] = sum(path.stat().st_size for path in files if not path.is_symlink())
    return totals


COMMANDS: dict[str, Callable[..., object]] = {
    "have": have,
    "free": free,
    "settle": settle,
    "list": list_files,
    "remove": remove,
    "sizes": sizes,
    "sweep": sweep,
}


def main(arguments: list[str]) -> int:
    """Run one command; return the exit code."""
    print(json.dumps(COMMANDS[arguments[0]](*arguments[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
