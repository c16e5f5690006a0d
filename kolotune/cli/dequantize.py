"""The verb `dequantize`: a quantized GGUF as a base model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from kolotune.foundation.errors import ConfigError

from .options import reporter
from .parameters import FileRole, Json


def dequantize(
    gguf: Annotated[Path, typer.Argument(help="The quantized GGUF."), FileRole.INPUT],
    base: Annotated[str, typer.Option(help="The model that it was made from."), FileRole.BASE_MODEL],
    out: Annotated[Path, typer.Option(help="The folder to create."), FileRole.NEW_FOLDER],
    json: Json = False,
) -> int:
    """Turn a quantized GGUF into a base model, to train on exactly its weights."""
    from kolotune.base_models import lookup
    from kolotune.foundation.files import replacing
    from kolotune.foundation.formatting import format_size
    from kolotune.gguf import dequantize as dequantizing
    from kolotune.weights import stored_blocks

    say = reporter(json)
    if out.exists():
        raise ConfigError(f"{out}: already exists", "Name a new folder; nothing is overwritten.")
    if not gguf.is_file():
        raise ConfigError(f"{gguf}: there is no such file", "Name the quantized GGUF.")
    base_folder = lookup.resolve(base, None, say)
    say.doing("reading the weights")
    with tempfile.TemporaryDirectory() as logs, replacing(out.absolute()) as partial:
        partial.mkdir(parents=True)
        made = dequantizing.dequantize(gguf, base_folder, partial, Path(logs, "converter.log"), say)
    types = ", ".join(f"{count} in {kind}" for kind, count in made.types.items()) or "none in blocks"
    size = (out / stored_blocks.FILE).stat().st_size
    say.success(f"{out}: {made.tensors} weights; matrices of the layers: {types} ({format_size(size)})")
    say.note(f"To train on it: kolotune run CHATS --base-model {out} --load-in-4bit")
    return 0
