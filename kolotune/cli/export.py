"""The verb `export`: an adapter or merged model made elsewhere to GGUF and Modelfile, without training."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from kolotune.run_folder.layout import RunFolder
from kolotune.weights.adapter_folder import is_adapter, no_adapter
from kolotune.weights.model_config import FILE as CONFIG

from .comparison_table import show_when_done
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
    from kolotune.base_models.adapter_base import base_of, naming_the_option
    from kolotune.pipeline.run import run_pipeline

    say = reporter(json)
    source = folder.absolute()
    values = drop_unset(flags)
    if is_adapter(source):
        values["base_model"] = base_of(source, base)
        names = ["merge", "convert", "quantize", "modelfile", "compare"]
    else:
        if not (source / CONFIG).is_file():
            raise no_adapter(source)
        values["base_model"] = str(source)
        names = ["convert", "quantize", "modelfile", "compare"]
    resolved = resolve_flags(values)
    show_settings(resolved, say, values, verbose=verbose or json)
    naming = naming_the_option(source, base) if is_adapter(source) else nullcontext()
    with naming, show_when_done(RunFolder(resolved.output_dir), say, enabled=resolved.compare):
        run_folder = run_pipeline(resolved, say, names, source)
    say.success(f"Done: {run_folder.root}")
    return 0
