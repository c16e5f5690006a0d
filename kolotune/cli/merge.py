"""The verb `merge`: a stage of a run folder, or an adapter made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR, Config
from kolotune.foundation.errors import ConfigError

from .one_stage import run_one_stage
from .options import reporter, resolve_flags, with_options
from .parameters import FileRole, Json, Run


@with_options()
def merge(
    run: Run = DEFAULT_OUTPUT_DIR,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter in PEFT's format, made elsewhere."), FileRole.INPUT
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Its base model; default: the one that it names."), FileRole.BASE_MODEL
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to create."), FileRole.NEW_FOLDER] = None,
    json: Json = False,
    **flags: object,
) -> int:
    """Merge the adapter into its base model."""
    if adapter is None and out is None and base is None:
        return run_one_stage("merge", run, json, flags)
    if adapter is None or out is None:
        raise ConfigError("merge: --adapter and --out need each other", "kolotune merge --adapter A --out M")
    return _merge_elsewhere(adapter, base, out, resolve_flags(flags), json)


def _merge_elsewhere(adapter: Path, base: str | None, out: Path, config: Config, json: bool) -> int:
    from kolotune.base_models import lookup
    from kolotune.base_models.adapter_base import base_of, naming_the_option
    from kolotune.foundation.files import replacing
    from kolotune.stages.merge import merge_adapter
    from kolotune.weights.merge import tokenizer_folder

    say = reporter(json)
    if out.exists():
        raise ConfigError(f"{out}: already exists", "Name a new folder; nothing is overwritten.")
    with naming_the_option(adapter, base):
        base_folder = lookup.resolve(base_of(adapter, base), None, say)
    with replacing(out.absolute()) as partial:
        partial.mkdir()
        merge_adapter(
            adapter,
            base_folder,
            partial,
            tokenizer=tokenizer_folder(adapter, base_folder),
            dtype=config.merge_dtype,
            reporter=say,
        )
    say.success(f"merged: {out}")
    return 0
