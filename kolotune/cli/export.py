"""The verb `export`: an adapter or merged model made elsewhere to GGUF and Modelfile, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kolotune.foundation.errors import ConfigError
from kolotune.weights.adapter import is_adapter, read_adapter

from .options import drop_unset, reporter, resolve_flags, with_options
from .parameters import FileRole, Json
from .settings import Verbose, show_settings


@with_options()
def export(
    folder: Annotated[Path, typer.Argument(help="An adapter or a merged model, made elsewhere."), FileRole.INPUT],
    base: Annotated[
        str | None, typer.Option(help="The adapter's base model; default: the one that it names."), FileRole.BASE_MODEL
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
    **flags: Any,
) -> int:
    """Turn an adapter or model made elsewhere into GGUF and Modelfile."""
    from kolotune.pipeline.run import run_pipeline

    say = reporter(json)
    source = folder.absolute()
    values = drop_unset(flags)
    if is_adapter(source):
        values["base_model"] = base or base_named_by(source)
        names = ["merge", "convert", "quantize", "modelfile"]
    else:
        values["base_model"] = str(source)
        names = ["convert", "quantize", "modelfile"]
    resolved = resolve_flags(values)
    show_settings(resolved, say, values, verbose=verbose or json)
    run_folder = run_pipeline(resolved, say, names, source)
    say.success(f"Done: {run_folder.root}")
    return 0


def base_named_by(adapter: Path) -> str:
    """Return the base model that an adapter's config names.

    Raises:
        ConfigError: it names none.
    """
    name = read_adapter(adapter).config.base_name
    if not name:
        raise ConfigError(f"{adapter}: adapter_config.json does not name a base model", "Name it with --base.")
    return name
