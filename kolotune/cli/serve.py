"""The verb `serve`: a result behind OpenAI's API."""

from __future__ import annotations

from typing import Annotated

import typer

from kolotune.foundation.config import DEFAULT_HOST, DEFAULT_OUTPUT_DIR, DEFAULT_PORT
from kolotune.run_folder.layout import RunFolder

from .options import reporter
from .parameters import Json, Quantization, Run


def serve(
    run: Run = DEFAULT_OUTPUT_DIR,
    host: Annotated[
        str, typer.Option(help="Address to listen on; with any but 127.0.0.1 other machines can connect.")
    ] = DEFAULT_HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = DEFAULT_PORT,
    quantization: Quantization = None,
    json: Json = False,
) -> int:
    """Serve the result on this machine through an OpenAI-compatible API."""
    from kolotune.serving.app import serve as serve_model
    from kolotune.serving.served_model import ServedModel

    serve_model(ServedModel(RunFolder(run.absolute()), quantization), host, port, reporter(json))
    return 0
