"""The verb `version`: the versions of kolotune and of what it works with, for a report or a program."""

from __future__ import annotations

import importlib.metadata
import platform

from kolotune.foundation import installation
from kolotune.version import VERSION

from .options import reporter
from .parameters import Json

# Of the packages that are installed with kolotune, those that results and faults depend on.
_PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "peft", "bitsandbytes", "gguf", "xllamacpp", "pyarrow",
    "huggingface-hub", "ollama", "docker", "submitit", "optuna", "python-calamine",
)  # fmt: skip
_NONE = "not installed"


def version(json: Json = False) -> int:
    """Show the versions of kolotune, of Python, and of the packages that it works with."""
    packages: dict[str, str | None] = {name: _installed(name) for name in _PACKAGES}
    packages["llama.cpp converter"] = installation.CONVERTER_VERSION
    python, system = platform.python_version(), platform.platform()
    say = reporter(json)
    if json:
        say.result(VERSION, python=python, platform=system, packages=packages)
        return 0
    rows = [("kolotune", VERSION), ("python", python), ("platform", system)]
    rows += [(name, number or _NONE) for name, number in packages.items()]
    say.table("Versions", ("part", "version"), rows)
    return 0


def _installed(name: str) -> str | None:
    """Return a package's version, from its metadata alone; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
