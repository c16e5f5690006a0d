"""torchtune's separate environment, installed on first use from the pinned list beside this file.

``python -m kolotune.engines.torchtune.environment [FOLDER]`` installs it now, in FOLDER or in the cache, and prints the
folder; images are built that way. The variable KOLOTUNE_TORCHTUNE names a folder that was installed elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import locks, typed_storage
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.errors import KolotuneError, OfflineError, ToolchainError
from kolotune.foundation.files import explained, remove
from kolotune.foundation.typed_storage import StorageError
from kolotune.runners import local

MODULE = "kolotune.engines.torchtune.environment"
VARIABLE = "KOLOTUNE_TORCHTUNE"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_MARKER = "kolotune.json"  # written last: an environment without it is incomplete
_PROOF = "import torch, torchao, torchtune.training, psutil; print(torch.__version__)"
_OTHER = "other than the pinned"  # a value in records


@dataclass(frozen=True)
class Environment:
    """A usable environment.

    Attributes:
        folder: of the environment.
        fingerprint: of the list that it was installed from.
    """

    folder: Path
    fingerprint: str

    @property
    def python(self) -> Path:
        return _python_of(self.folder)


def pinned() -> str:
    """Return the fingerprint of the pinned list."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    requirements = sorted(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    return hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]


def fingerprint() -> str:
    """Return what a training in the environment depends on; it is known before the environment is installed."""
    configured = _configured_folder()
    return pinned() if configured is None else _installed_from(configured) or _OTHER


def find() -> Environment | None:
    """Return the environment, if it is installed.

    Raises:
        ToolchainError: KOLOTUNE_TORCHTUNE names a folder without an environment.
    """
    folder = _configured_folder()
    if folder is not None:
        if not _python_of(folder).is_file():
            raise ToolchainError(
                f"{VARIABLE}={folder}: there is no Python in it",
                f"Unset it, or install one there: python -m {MODULE} {folder}",
            )
        return Environment(folder, _installed_from(folder) or _OTHER)
    return _if_complete(_cached())


def ensure(doing: Callable[[str], None]) -> Environment:
    """Return the environment; install it the first time.

    Args:
        doing: called with what takes long.

    Raises:
        OfflineError: its packages can't be installed.
        ToolchainError: Python can't create an environment, or torchtune does not work in it.
        SpaceError: the disk is full.
    """
    return find() or make(_cached(), doing)


def make(folder: Path, doing: Callable[[str], None]) -> Environment:
    """Install the environment in `folder`, unless it is there; a second process waits for the first."""
    with ExitStack() as held:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locks.hold(folder.with_name(f".{folder.name}.lock")))
        except OSError as error:
            raise explained(error, folder) from error
        there = _if_complete(folder)
        if there is not None:
            return there
        doing("installing torchtune's environment (1.4 GB, more with a GPU), once")
        try:
            _install(folder, folder.with_name(f"{folder.name}.log"))
        except BaseException:
            with contextlib.suppress(OSError):
                remove(folder)
            raise
        typed_storage.write(folder / _MARKER, {"requirements": pinned()})
        return Environment(folder, pinned())


def _install(folder: Path, log: Path) -> None:
    remove(folder)
    remove(log)
    # This environment's pip fills the new one. That needs neither pip nor ensurepip, which Debian leaves out.
    if local.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], log=log) != 0:
        raise ToolchainError(
            f"torchtune's environment can't be created: {local.last_lines(log)}",
            f"See {log}; is Python's venv installed?",
        )
    python = str(_python_of(folder))
    argv = [sys.executable, "-m", "pip", "--python", python, "install", "--disable-pip-version-check", "--no-input"]
    # With a PYTHONPATH pip would see packages that are not in the new environment.
    code = local.run([*argv, "--quiet", "--requirement", str(REQUIREMENTS)], log=log, env={"PYTHONPATH": ""})
    if code != 0:
        raise OfflineError(
            f"torchtune's packages can't be installed: {local.last_lines(log)}",
            f"Check the network and pip's settings, then run the same command again; see {log}.",
        )
    if local.run([python, "-I", "-c", _PROOF], log=log) != 0:
        raise ToolchainError(f"torchtune can't be imported: {local.last_lines(log)}", f"See {log}.")


def _if_complete(folder: Path) -> Environment | None:
    """Return the environment in `folder` if it is complete and installed from the pinned list."""
    usable = _installed_from(folder) == pinned() and _python_of(folder).is_file()
    return Environment(folder, pinned()) if usable else None


def _installed_from(folder: Path) -> str | None:
    """Return the fingerprint of the list that `folder` was installed from; None when it is unknown."""
    with contextlib.suppress(OSError, StorageError, KeyError):
        return str(typed_storage.read_object(folder / _MARKER)["requirements"])
    return None


def _configured_folder() -> Path | None:
    configured = os.environ.get(VARIABLE)
    return Path(configured).expanduser().absolute() if configured else None


def _cached() -> Path:
    return cache_folder("torchtune") / pinned()


def _python_of(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def main(arguments: list[str]) -> int:
    """Install the environment in the folder `arguments[0]`, or in the cache; print the folder."""
    try:
        folder = Path(arguments[0]).absolute() if arguments else _cached()
        if arguments and folder.exists() and not (folder / "pyvenv.cfg").is_file() and any(folder.iterdir()):
            raise ToolchainError(f"{folder}: holds something other than an environment", "Name a new folder.")
        print(make(folder, lambda text: print(text, file=sys.stderr)).folder)
    except KolotuneError as error:
        print(f"{error.cause}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
