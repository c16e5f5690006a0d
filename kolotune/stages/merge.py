"""merge: base and adapter → one model folder, some rows at a time, computed in fp32."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from kolotune.foundation.config import Config, stage_options
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.stage import Context
from kolotune.weights.merge import MergedModel, companion_files, tokenizer_folder
from kolotune.weights.shards import split_into_shards, write_shards
from kolotune.weights.weight_files import weight_files

NAME = "merge"
DOING = "merging the adapter into the base model"


def options(config: Config) -> JsonObject:
    return stage_options(config, NAME)


def inputs(context: Context) -> dict[str, Path]:
    return {
        "the adapter": _adapter_folder(context),
        "the base model": context.base,
        "the tokenizer": _tokenizer_folder(context),
    }


def outputs(context: Context) -> list[Path]:
    return [context.run.merged_model]


def packages() -> Sequence[str]:
    return ("numpy", "safetensors")


def preflight(context: Context, reporter: Reporter) -> None:
    """Check that the base model's weights can be read, and that an adapter made elsewhere can be merged into them."""
    del reporter
    weight_files(context.base)
    if context.source is not None:
        MergedModel(context.source, context.base, context.config.merge_dtype).check_tokenizer(
            _tokenizer_folder(context)
        )


def run(context: Context, reporter: Reporter) -> JsonObject:
    """Write the merged model; see `merge_adapter`."""
    with context.hasher.replacing(context.run.merged_model) as partial:
        partial.mkdir()
        return merge_adapter(
            _adapter_folder(context),
            context.base,
            partial,
            tokenizer=_tokenizer_folder(context),
            dtype=context.config.merge_dtype,
            reporter=reporter,
            hasher=context.hasher,
        )


def _adapter_folder(context: Context) -> Path:
    return context.source or context.run.adapter


def _tokenizer_folder(context: Context) -> Path:
    """Return the trained tokenizer: the run's own, or the one that an adapter made elsewhere brings, or the base's."""
    if context.source is None:
        return context.run.tokenizer
    return tokenizer_folder(context.source, context.base)


def merge_adapter(
    adapter_folder: Path,
    base: Path,
    target: Path,
    *,
    tokenizer: Path,
    dtype: str,
    reporter: Reporter,
    hasher: Hasher | None = None,
) -> JsonObject:
    """Merge an adapter into its base model.

    Args:
        adapter_folder: in PEFT's format.
        base: model folder with safetensors.
        target: an existing empty folder.
        tokenizer: folder with the tokenizer and template for the merged model.
        dtype: "f16", "bf16" or "fp32".
        reporter: shows a warning about weights that f16 can't represent.
        hasher: learns the hashes of the weight files.

    Returns:
        Facts for the record: number of tensors, bytes, adapted weights, and weights stored in a wider type.

    Raises:
        ArtifactError, ModelError: the adapter does not belong to the base model, or a file is damaged.
    """
    model = MergedModel(adapter_folder, base, dtype)
    model.check_tokenizer(tokenizer)
    model.write(lambda: write_shards(target, split_into_shards(model.entries), model.blocks, hasher), reporter)
    (target / "config.json").write_text(model.config_text(), encoding="utf-8", newline="")
    for name, source in companion_files(base, tokenizer).items():
        shutil.copyfile(source, target / name)
    return {
        "tensors": len(model.entries),
        "bytes": sum(entry.size for entry in model.entries),
        "adapted": model.adapted,
        "stored_wider": model.stored_wider,
    }
