"""The verbs about Ollama: install, uninstall."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from kolotune.run_folder.layout import RunFolder

from .options import Json, reporter


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this module."""
    for verb in (install, uninstall):
        app.command()(verb)


def install(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    name: Annotated[str, typer.Argument(help="Its name in Ollama: [namespace/]model[:tag].")],
    quantization: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Which GGUF: a quantization of the run, or none; default: the run's first."),
    ] = None,
    system: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="System prompt in place of the Modelfile's; any text."),
    ] = None,
    parameter: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="As temperature=0.7, in place of the Modelfile's; may be given several times."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another model of that name.")] = False,
    json: Json = False,
) -> int:
    """Puts a run's model into Ollama (OLLAMA_HOST, else this machine) and checks that it arrived."""
    from kolotune.ollama import install as installing

    installing.install(
        RunFolder(run.absolute()),
        name,
        reporter(json),
        quantization=quantization,
        system=system,
        parameters=parameter or (),
        force=force,
    )
    return 0


def uninstall(
    name: Annotated[str, typer.Argument(help="Its name in Ollama.")],
    json: Json = False,
) -> int:
    """Takes a model out of Ollama."""
    from kolotune.ollama import install as installing

    installing.uninstall(name, reporter(json))
    return 0
