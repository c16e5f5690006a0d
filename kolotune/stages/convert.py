"""convert: merged model → unquantized GGUF. Of a lean run: base and adapter → unquantized GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kolotune.foundation.config import Config, plain_values
from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.installation import CONVERTER_PACKAGE
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.gguf import conversion_source
from kolotune.run_folder.stage import Context

NAME = "convert"
DOING = "converting to GGUF"


def options(config: Config) -> JsonObject:
    return plain_values(config, ("lean", "merge_dtype")) if config.lean else {}


def inputs(context: Context) -> dict[str, Path]:
    return conversion_source.conversion_inputs(context)


def outputs(context: Context) -> list[Path]:
    return [context.run.gguf, *conversion_source.tokenizer_outputs(context)]


def packages() -> Sequence[str]:
    return (CONVERTER_PACKAGE,)


def preflight(context: Context, reporter: Reporter) -> None:
    """Check on the base model, before hours of training, that the converter knows its architecture and tokenizer.

    Raises:
        ToolchainError: it does not.
    """
    conversion_source.prove_convertible(context, reporter)


def run(context: Context, reporter: Reporter) -> JsonObject:
    """Write the GGUF; return what the converter reports about it."""
    folder = conversion_source.source_folder(context)
    if folder is not None and not folder.is_dir():
        raise ArtifactError(f"{folder}: there is no merged model", "Run `kolotune merge` first.")
    return conversion_source.make_gguf(context, context.run.gguf, context.run.log(NAME), reporter)
