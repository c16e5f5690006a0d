"""The verb `install`: put a run's model into Ollama."""

from __future__ import annotations

from typing import Annotated

import typer

from kolotune.run_folder.layout import RunFolder

from .options import reporter
from .parameters import Json, Quantization, Run


def install(
    run: Run,
    name: Annotated[str, typer.Argument(help="Its name in Ollama: [namespace/]model[:tag].")],
    quantization: Quantization = None,
    system: Annotated[str | None, typer.Option(help="System prompt, instead of the Modelfile's; any text.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option(help="Such as temperature=0.7, instead of the Modelfile's; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a different model of that name.")] = False,
    json: Json = False,
) -> int:
    """Put a run's model into Ollama and check that it arrived."""
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
