"""torchtune's own environment: found, or made on first use from the pinned list beside this file.

``python -m kolotune.engines.torchtune.environment [FOLDER]`` makes it now, in FOLDER or in the cache, and prints
where it is; images are built with that. The variable KOLOTUNE_TORCHTUNE names a folder made elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.errors import KolotuneError, OfflineError, ToolchainError
from kolotune.foundation.files import explained, remove
from kolotune.runners import local

MODULE = "kolotune.engines.torchtune.environment"
VARIABLE = "KOLOTUNE_TORCHTUNE"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_MARKER = "kolotune.json"  # written last: an environment without it is not whole
_PROOF = "import torch, torchao, torchtune.training, psutil; print(torch.__version__)"
_OTHER = "other than the pinned"


@dataclass(frozen=True)
class Environment:
    """A usable environment: its folder and what it was made from."""

    folder: Path
    fingerprint: str

    @property
    def python(self) -> Path:
        return _python_of(self.folder)


def pinned() -> str:
    """The fingerprint of the pinned list."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    wanted = sorted(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    return hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:12]


def fingerprint() -> str:
    """What a training in the environment depends on; known before the environment is made."""
    given = os.environ.get(VARIABLE)
    return pinned() if not given else _made_from(_folder_of(given)) or _OTHER


def find() -> Environment | None:
    """The environment, if it is on this machine already.

    Raises:
        ToolchainError: KOLOTUNE_TORCHTUNE names a folder without one.
    """
    given = os.environ.get(VARIABLE)
    if given:
        folder = _folder_of(given)
        if not _python_of(folder).is_file():
            raise ToolchainError(
                f"{VARIABLE}={folder}: there is no Python in it",
                f"Unset it, or make one there: python -m {MODULE} {folder}",
            )
        return Environment(folder, _made_from(folder) or _OTHER)
    return _whole(_cached())


def ensure(doing: Callable[[str], None]) -> Environment:
    """The environment, made the first time.

    Args:
        doing: told what takes long.

    Raises:
        OfflineError: its packages can't be installed.
        ToolchainError: Python can't make one, or what was made does not work.
        SpaceError: the disk is full.
    """
    return find() or make(_cached(), doing)


def make(folder: Path, doing: Callable[[str], None]) -> Environment:
    """Makes the environment in `folder`, unless it is there; a second process waits for the first."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise explained(error, folder) from error
    try:
        there = _whole(folder)
        if there is not None:
            return there
        doing("making torchtune's environment (1.4 GB, more with a GPU), once")
        try:
            _install(folder, folder.with_name(f"{folder.name}.log"))
        except BaseException:
            with contextlib.suppress(OSError):
                remove(folder)
            raise
        typed_storage.write(folder / _MARKER, {"requirements": pinned()})
        return Environment(folder, pinned())
    finally:
        lock.release()


def _install(folder: Path, log: Path) -> None:
    remove(folder)
    remove(log)
    # pip of this environment fills the other: that one needs none of its own, nor ensurepip, which Debian leaves out.
    if local.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], log=log) != 0:
        raise ToolchainError(
            f"torchtune's environment can't be made: {local.last_lines(log)}", f"See {log}; is Python's venv installed?"
        )
    python = str(_python_of(folder))
    argv = [sys.executable, "-m", "pip", "--python", python, "install", "--disable-pip-version-check", "--no-input"]
    # An own PYTHONPATH would show pip packages that are not in the new environment.
    code = local.run([*argv, "--quiet", "--requirement", str(REQUIREMENTS)], log=log, env={"PYTHONPATH": ""})
    if code != 0:
        raise OfflineError(
            f"torchtune's packages can't be installed: {local.last_lines(log)}",
            f"Check the network and pip's settings, then run the same command again; see {log}.",
        )
    if local.run([python, "-I", "-c", _PROOF], log=log) != 0:
        raise ToolchainError(f"torchtune can't be imported: {local.last_lines(log)}", f"See {log}.")


def _whole(folder: Path) -> Environment | None:
    """The environment in `folder` if it is whole and from the pinned list."""
    usable = _made_from(folder) == pinned() and _python_of(folder).is_file()
    return Environment(folder, pinned()) if usable else None


def _made_from(folder: Path) -> str | None:
    """The fingerprint of the list that the environment in `folder` was made from; None when it does not say."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((folder / _MARKER).read_text(encoding="utf-8"))["requirements"])
    return None


def _folder_of(given: str) -> Path:
    return Path(given).expanduser().absolute()


def _cached() -> Path:
    return cache_folder("torchtune") / pinned()


def _python_of(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def main(arguments: list[str]) -> int:
    """Makes the environment in the folder `arguments[0]`, or in the cache; prints where it is."""
    try:
        folder = Path(arguments[0]).absolute() if arguments else _cached()
        if arguments and folder.exists() and not (folder / "pyvenv.cfg").is_file() and any(folder.iterdir()):
            raise ToolchainError(f"{folder}: holds something else than an environment", "Name a new folder.")
        print(make(folder, lambda text: print(text, file=sys.stderr)).folder)
    except KolotuneError as error:
        print(f"{error.cause}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
