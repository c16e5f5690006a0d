"""The verb `uninstall`: remove a model from Ollama."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import reporter
from .parameters import Json


def uninstall(name: Annotated[str, typer.Argument(help="Its name in Ollama.")], json: Json = False) -> int:
    """Remove a model from Ollama."""
    from kolotune.ollama import install as installing

    installing.uninstall(name, reporter(json))
    return 0
