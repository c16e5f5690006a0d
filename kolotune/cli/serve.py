"""The verb `serve`: results behind OpenAI's API."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from kolotune.foundation.config import DEFAULT_HOST, DEFAULT_OUTPUT_DIR, DEFAULT_PARALLEL, DEFAULT_PORT
from kolotune.foundation.errors import ConfigError
from kolotune.run_folder.layout import RunFolder

from .options import reporter
from .parameters import FileRole, Json, Quantization


def serve(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="The run folder; of several, a request's model names one.",
            show_default=str(DEFAULT_OUTPUT_DIR),
        ),
        FileRole.RUN_FOLDER,
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; with any but 127.0.0.1 other machines can connect.")
    ] = DEFAULT_HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = DEFAULT_PORT,
    parallel: Annotated[
        int, typer.Option(min=1, help="Requests that are answered at the same time; each takes memory for a context.")
    ] = DEFAULT_PARALLEL,
    quantization: Quantization = None,
    share_base: Annotated[
        bool,
        typer.Option(
            "--share-base",
            help="Load the base model of several runs once, and add the adapter of the run that a request names.",
        ),
    ] = False,
    json: Json = False,
) -> int:
    """Serve the result on this machine through an OpenAI-compatible API."""
    from kolotune.foundation import shared_libraries
    from kolotune.llamacpp import server_program
    from kolotune.serving.app import serve as serve_models
    from kolotune.serving.served_model import ServedModel
    from kolotune.serving.shared_base import open_models

    folders = [RunFolder(run.absolute()) for run in runs or [DEFAULT_OUTPUT_DIR]]
    names = Counter(folder.root.name for folder in folders)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"serve: several runs have the name {twice[0]!r}", "Rename one of the folders.")
    say = reporter(json)
    with contextlib.ExitStack() as models:
        if share_base:
            served = open_models(folders, quantization, parallel, say, models)
        else:
            served = [models.enter_context(ServedModel(folder, quantization, parallel)) for folder in folders]
        if program := server_program.find():
            say.note(f"llama.cpp: {program} answers")
        elif faster := shared_libraries.faster_one():
            say.note(f"llama.cpp: {faster}")
        serve_models(served, host, port, say)
    return 0
