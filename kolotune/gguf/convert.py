"""A model to an unquantized GGUF: from its folder, or from base and adapter without any folder between."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune import llamacpp
from kolotune.chats.templates.frozen_date import freeze_date
from kolotune.chats.tokens.tokenizer import TEMPLATE_FILE, template_of, template_text, trained_tokenizer, writes_bos
from kolotune.foundation.errors import ArtifactError, KolotuneError, ToolchainError
from kolotune.foundation.files import remove, replacing
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.records import now
from kolotune.run_folder.retention import kept_models
from kolotune.run_folder.stage import Context
from kolotune.runners import local
from kolotune.weights.adapter import is_adapter
from kolotune.weights.merge import MergedModel, small_files, tokenizer_of
from kolotune.weights.tensors import Entry, MappedTensors, index_of, row_blocks, shards_of, weight_files, write_shards

from . import conversion_plan, header
from .conversion_plan import Outline, Shape

if TYPE_CHECKING:
    import numpy as np

_ADD_BOS = "tokenizer.ggml.add_bos_token"
Blocks = Callable[[Entry], "Iterator[np.ndarray]"]


def convert_folder(model: Path, target: Path, log: Path, reporter: Reporter, *, exact: bool = True) -> dict[str, Any]:
    """Converts a model folder to a GGUF, reads it back and checks it against the folder.

    Args:
        model: folder in the hub's format.
        target: the GGUF to make.
        log: where the converter's output goes.
        reporter: told when the GGUF gets larger than 16 bits a weight.
        exact: keep every weight's value; False: f16, whatever the weights are.

    Returns:
        Facts for the record: architecture, number of tensors, type, version of the toolchain, and whether the
        weights were streamed into the converter's outline or all was done by the converter itself.

    Raises:
        ToolchainError: the converter failed.
        ArtifactError: what it wrote is not whole, or its template or BOS is not the folder's.
    """
    toolchain = llamacpp.ensure(reporter)
    tensors = MappedTensors(weight_files(model))
    kind = _kind(tensors.entries, reporter) if exact else "f16"
    shape = conversion_plan.shape_of(model)
    verdict = conversion_plan.draw(shape, kind, toolchain, log)

    def blocks(entry: Entry) -> Iterator[np.ndarray]:
        values = tensors[entry.name]
        return (values[rows] if values.ndim else values for rows in row_blocks(entry))

    with replacing(target) as partial:
        if verdict.outline is not None:
            _stream(verdict.outline, shape, partial, tensors.entries, blocks)
        else:
            _by_the_converter(model, kind, toolchain, partial, log)
        return _checked(partial, shape, target, kind, toolchain, streamed=verdict.outline is not None)


def convert_adapter(
    adapter: Path, base: Path, tokenizer: Path, *, dtype: str, name: str, target: Path, log: Path, reporter: Reporter
) -> dict[str, Any]:
    """Merges and converts at once: the same GGUF as by way of a merged folder called `name`, which is not made.

    Where llama.cpp's converter has to do it (see `outline`), the folder is made beside `target` and removed again.

    Returns:
        Facts for the record: those of `convert_folder`, and those of merging.

    Raises:
        ArtifactError, ModelError, ToolchainError: as merging and converting.
    """
    toolchain = llamacpp.ensure(reporter)
    model = MergedModel(adapter, base, dtype)

    def write(partial: Path) -> dict[str, Any]:
        entries = {entry.name: entry for entry in model.entries}
        kind = _kind(entries, reporter)
        shape = merged_shape(model, small_files(base, tokenizer), name)
        verdict = conversion_plan.draw(shape, kind, toolchain, log)
        if verdict.outline is not None:
            _stream(verdict.outline, shape, partial, entries, model.blocks)
        else:
            reporter.note(f"a merged folder is needed for a while: {verdict.reason}")
            _by_way_of_a_folder(model, shape, kind, toolchain, partial, log)
        return _checked(partial, shape, target, kind, toolchain, streamed=verdict.outline is not None)

    with replacing(target) as partial:
        facts = model.written(lambda: write(partial), reporter)
    return {**facts, "adapted": model.adapted, "stored_wider": model.stored_wider}


def source_folder(context: Context) -> Path | None:
    """The folder that is converted: the run's merged model, or one made elsewhere; None: base and adapter are."""
    if context.source is not None and not is_adapter(context.source):
        return context.source
    return context.run.merged_model if kept_models(context.config).merged else None


def inputs_of(context: Context) -> dict[str, Path]:
    """What the unquantized GGUF is made of, by the names that they have in messages."""
    folder = source_folder(context)
    if folder is not None:
        return {"the merged model": folder}
    return {
        "the adapter": context.source or context.run.adapter,
        "the base model": context.base,
        "the tokenizer": _tokenizer(context),
    }


def _tokenizer(context: Context) -> Path:
    return context.run.tokenizer if context.source is None else tokenizer_of(context.source, context.base)


def small_outputs(context: Context) -> list[Path]:
    """What is kept of a merged folder that is not: of an adapter made elsewhere, its tokenizer."""
    lean = source_folder(context) is None
    return [context.run.exported_tokenizer] if lean and context.source is not None else []


def make_gguf(context: Context, target: Path, log: Path, reporter: Reporter) -> dict[str, Any]:
    """The unquantized GGUF of a run; see `convert_folder` and `convert_adapter`."""
    folder = source_folder(context)
    if folder is not None:
        return convert_folder(folder, target, log, reporter)
    for path in small_outputs(context):
        with replacing(path) as partial:
            partial.mkdir()
            for name, source in small_files(context.base, _tokenizer(context)).items():
                shutil.copyfile(source, partial / name)
    return convert_adapter(
        context.source or context.run.adapter,
        context.base,
        _tokenizer(context),
        dtype=context.config.merge_dtype,
        name=context.run.merged_model.name,
        target=target,
        log=log,
        reporter=reporter,
    )


def merged_shape(model: MergedModel, small: Mapping[str, Path | str], name: str) -> Shape:
    """The merged folder that there is, or would be."""
    shards = shards_of(model.entries)
    return Shape(name, {**small, "config.json": model.config_text(), **index_of(shards)}, tuple(shards))


def prove_expected(context: Context, reporter: Reporter) -> None:
    """Proves on the base, before hours of training, that llama.cpp can convert what will come of it.

    It is asked for just that, as far as it is known, so that its outline is there when it is wanted.

    Raises:
        ToolchainError: it can't.
    """
    shape, kind = expected(context)
    _prove(shape, kind, context.run.log("dry_conversion"), reporter)


def expected(context: Context) -> tuple[Shape, str]:
    """What will be converted, as far as it is known before there is an adapter, and the type of the GGUF."""
    folder = source_folder(context)
    if context.source is not None and folder == context.source:
        return conversion_plan.shape_of(folder), conversion_plan.kind_of(MappedTensors(weight_files(folder)).entries)
    model = MergedModel(None, context.base, context.config.merge_dtype)
    if context.source is not None:
        small: dict[str, Path | str] = {**small_files(context.base, tokenizer_of(context.source, context.base))}
    elif context.run.tokenizer.is_dir():
        small = {**small_files(context.base, context.run.tokenizer)}
    else:
        small = {**small_files(context.base, context.base), **_tokenizer_to_be(context)}
    kind = conversion_plan.kind_of({entry.name: entry for entry in model.entries})
    return merged_shape(model, small, context.run.merged_model.name), kind


def _tokenizer_to_be(context: Context) -> dict[str, Path | str]:
    """What prepare will write, if it can; if it can't, it says so itself."""
    day = date.fromisoformat(context.config.template_date or now()[:10])
    try:
        jinja = freeze_date(template_text(context.base), day)
        return trained_tokenizer(context.base, jinja, adds_bos=writes_bos(template_of(context.base), jinja))
    except KolotuneError:
        return {}


def _prove(shape: Shape, kind: str, log: Path, reporter: Reporter) -> None:
    toolchain = llamacpp.ensure(reporter)
    if not conversion_plan.is_drawn(shape, kind, toolchain):
        reporter.doing("dry conversion: can llama.cpp convert this model?")
    verdict = conversion_plan.draw(shape, kind, toolchain, log)
    if verdict.code == 0 and toolchain.version != "own":
        return
    with conversion_plan.temporary(shape, zeros=True) as folder:
        argv = [*_argv(toolchain, folder, kind, folder / "none.gguf"), "--dry-run"]
        code = local.run(argv, log=log, env=conversion_plan.OFFLINE)
    if code != 0:
        raise ToolchainError(
            f"llama.cpp can't convert {shape.name}: {local.last_lines(log)}",
            f"Use a base model that it knows; the whole answer is in {log}.",
        )


def _kind(entries: Mapping[str, Entry], reporter: Reporter) -> str:
    kind = conversion_plan.kind_of(entries)
    if kind == "f32":
        reporter.warning("not all weights are f16: the unquantized GGUF is written in f32, so that it holds them all")
    return kind


def _stream(drawn: Outline, shape: Shape, target: Path, entries: Mapping[str, Entry], blocks: Blocks) -> None:
    wanted = _wanted_bos(shape)
    if wanted is not None:
        # The converter believes tokenizer.json's post-processor, which the chats were not encoded with.
        drawn = dataclasses.replace(drawn, header=header.with_flag(drawn.header, _ADD_BOS, wanted))
    conversion_plan.write_gguf(drawn, target, entries, blocks)


def _by_the_converter(model: Path, kind: str, toolchain: llamacpp.Toolchain, target: Path, log: Path) -> None:
    code = local.run(_argv(toolchain, model, kind, target), log=log, env=conversion_plan.OFFLINE)
    if code != 0 or not target.is_file():
        raise ToolchainError(f"llama.cpp's converter failed: {local.last_lines(log)}", f"The log is {log}.")


def _by_way_of_a_folder(
    model: MergedModel, shape: Shape, kind: str, toolchain: llamacpp.Toolchain, target: Path, log: Path
) -> None:
    room = target.with_name(f".{shape.name}.partial")
    remove(room)
    try:
        room.mkdir(parents=True)
        folder = shape.written(room)
        write_shards(folder, shape.shards, model.blocks)
        _by_the_converter(folder, kind, toolchain, target, log)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _argv(toolchain: llamacpp.Toolchain, model: Path, kind: str, target: Path) -> list[str]:
    argv = [sys.executable, str(toolchain.converter), "--outtype", kind, "--outfile", str(target.absolute())]
    return [*argv, str(model.absolute())]


def _checked(
    made: Path, shape: Shape, shown: Path, kind: str, toolchain: llamacpp.Toolchain, *, streamed: bool
) -> dict[str, Any]:
    """Template and BOS of the GGUF must be those that were trained with.

    Returns:
        Facts for the record.
    """
    summary = header.read(made)
    wanted = _wanted_bos(shape)
    if wanted is not None and summary.fields.get(_ADD_BOS, wanted) != wanted:
        header.set_flag(made, _ADD_BOS, wanted)
        summary = header.read(made)
    if TEMPLATE_FILE in shape.files and summary.fields.get("tokenizer.chat_template") != shape.text(TEMPLATE_FILE):
        raise ArtifactError(f"{shown}: its chat template is not the one that was trained with")
    if wanted is not None and bool(summary.fields.get(_ADD_BOS, wanted)) != wanted:
        raise ArtifactError(f"{shown}: its BOS is not the one that was trained with")
    return {
        "architecture": summary.architecture,
        "tensors": len(summary.tensors),
        "type": kind,
        "toolchain": toolchain.version,
        "streamed": streamed,
    }


def _wanted_bos(shape: Shape) -> bool | None:
    """Whether who serves the model has to add a BOS; None: its folder doesn't say."""
    name = "tokenizer_config.json"
    wanted = json.loads(shape.text(name)).get("add_bos_token") if name in shape.files else None
    return wanted if isinstance(wanted, bool) else None
