"""Convert a model to an unquantized GGUF: from its folder, or from base and adapter without a merged folder."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune import llamacpp
from kolotune.chats.tokens.tokenizer import TEMPLATE_FILE
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, ToolchainError
from kolotune.foundation.files import remove
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners import child_process, local
from kolotune.weights import model_config
from kolotune.weights.mapped_tensors import MappedTensors, row_blocks
from kolotune.weights.merge import MergedModel, companion_files
from kolotune.weights.safetensors_header import Entry
from kolotune.weights.shards import index_file, split_into_shards, write_shards
from kolotune.weights.weight_files import weight_files

from . import conversion_plan, header, load_proof, plan_cache, writer_form
from .model_skeleton import ModelSkeleton, read_skeleton

if TYPE_CHECKING:
    import numpy as np

_ADD_BOS = "tokenizer.ggml.add_bos_token"
_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class _Conversion:
    """A GGUF to be made.

    Attributes:
        skeleton: of the model folder that is converted, or would be.
        gguf_type: "f16", "bf16" or "f32".
        target: its final path, for messages.
    """

    skeleton: ModelSkeleton
    gguf_type: str
    target: Path
    toolchain: llamacpp.Toolchain
    log: Path

    def find_plan(self) -> plan_cache.PlanResult:
        return plan_cache.find_plan(self.skeleton, self.gguf_type, self.toolchain, self.log)


def convert_folder(
    model: Path, target: Path, log: Path, reporter: Reporter, *, exact: bool = True, hasher: Hasher | None = None
) -> JsonObject:
    """Convert a model folder to a GGUF, read it back and compare it with the folder.

    Args:
        model: folder in the Hugging Face format.
        target: the GGUF to write.
        log: receives the converter's output.
        reporter: warned when the GGUF takes more than 16 bits a weight.
        exact: keep every weight's value; False: f16, whatever the weights are.
        hasher: learns the hash of the GGUF.

    Returns:
        Facts for the record: architecture, number of tensors, type, form, version of the toolchain, and whether the
        weights were streamed by a conversion plan.

    Raises:
        ToolchainError: the converter failed.
        ArtifactError: the result is not whole, or its template or BOS differs from the folder's.
    """
    toolchain, hasher = llamacpp.ensure(reporter), hasher or Hasher()
    tensors = MappedTensors(weight_files(model))
    gguf_type = _exact_type(tensors.entries, reporter) if exact else "f16"
    conversion = _Conversion(read_skeleton(model), gguf_type, target, toolchain, log)
    plan = conversion.find_plan().plan

    def blocks(entry: Entry) -> Iterator[np.ndarray]:
        values = tensors[entry.name]
        return (values[rows] if values.ndim else values for rows in row_blocks(entry))

    with hasher.replacing(target) as partial:
        if plan is not None:
            conversion_plan.write_gguf(_with_bos(plan, conversion.skeleton), partial, tensors.entries, blocks, hasher)
        else:
            _convert_by_converter(conversion, model, partial)
        return _checked(conversion, partial, streamed=plan is not None)


def convert_adapter(
    adapter: Path | None,
    base: Path,
    tokenizer: Path,
    *,
    dtype: str,
    name: str,
    target: Path,
    log: Path,
    reporter: Reporter,
    hasher: Hasher | None = None,
) -> JsonObject:
    """Merge and convert at once: the GGUF that a merged folder called `name` would give, without making the folder.

    When there is no conversion plan, the folder is written beside `target` and removed afterwards. Without an adapter
    it is the base model with that tokenizer.

    Returns:
        Facts for the record: those of `convert_folder`, and those of merging.

    Raises:
        ArtifactError, ModelError, ToolchainError: as for merging and converting.
    """
    toolchain, hasher = llamacpp.ensure(reporter), hasher or Hasher()
    model = MergedModel(adapter, base, dtype)
    model.check_tokenizer(tokenizer)

    def write(partial: Path) -> JsonObject:
        entries = {entry.name: entry for entry in model.entries}
        skeleton = merged_skeleton(model, companion_files(base, tokenizer), name)
        conversion = _Conversion(skeleton, _exact_type(entries, reporter), target, toolchain, log)
        result = conversion.find_plan()
        if result.plan is not None:
            conversion_plan.write_gguf(_with_bos(result.plan, skeleton), partial, entries, model.blocks, hasher)
        else:
            reporter.note(f"writing a temporary merged folder: {result.reason}")
            _convert_temporary_folder(conversion, model, partial)
        return _checked(conversion, partial, streamed=result.plan is not None)

    with hasher.replacing(target) as partial:
        facts = model.write(lambda: write(partial), reporter)
    return {**facts, "adapted": model.adapted, "stored_wider": model.stored_wider}


def plan_without_adapter(
    base: Path, tokenizer: Path, *, dtype: str, name: str, log: Path, reporter: Reporter
) -> conversion_plan.ConversionPlan | None:
    """Return how `convert_adapter` makes a GGUF without an adapter; None when llama.cpp's converter makes it."""
    model = MergedModel(None, base, dtype)
    skeleton = merged_skeleton(model, companion_files(base, tokenizer), name)
    gguf_type = _exact_type({entry.name: entry for entry in model.entries}, reporter)
    return plan_cache.find_plan(skeleton, gguf_type, llamacpp.ensure(reporter), log).plan


def merged_skeleton(model: MergedModel, companions: Mapping[str, Path | str | bytes], name: str) -> ModelSkeleton:
    """Return the skeleton of the merged folder that exists, or would."""
    shards = split_into_shards(model.entries)
    files = {**companions, model_config.FILE: model.config_text(), **index_file(shards)}
    return ModelSkeleton(name, files, tuple(shards))


def prove(skeleton: ModelSkeleton, gguf_type: str, log: Path, reporter: Reporter) -> None:
    """Prove without the weights' values that llama.cpp converts a model, and loads the result.

    Its plan is in the cache afterwards.

    Raises:
        ToolchainError: it can't.
    """
    toolchain = llamacpp.ensure(reporter)
    if not plan_cache.is_planned(skeleton, gguf_type, toolchain):
        reporter.doing("dry conversion: can llama.cpp convert this model?")
    result = plan_cache.find_plan(skeleton, gguf_type, toolchain, log)
    if not result.is_convertible:
        _convert_dry(skeleton, gguf_type, toolchain, log)
    folder = plan_cache.plan_folder(skeleton, gguf_type, toolchain)
    if load_proof.is_proven(folder):
        return
    with plan_cache.temporary_folder(skeleton) as model:
        hollow = model.with_name("hollow.gguf")
        if result.plan is not None:
            conversion_plan.write_sparse_gguf(result.plan, hollow)
        else:
            _convert_by_converter(
                _Conversion(skeleton, gguf_type, hollow, toolchain, log), model, hollow, "--vocab-only"
            )
        load_proof.prove_loadable(hollow, log, vocabulary=result.plan is None)
    load_proof.remember(folder)


def _convert_dry(skeleton: ModelSkeleton, gguf_type: str, toolchain: llamacpp.Toolchain, log: Path) -> None:
    with plan_cache.temporary_folder(skeleton, zeros=True) as folder:
        target = folder / "none.gguf"
        code = _run_converter(_Conversion(skeleton, gguf_type, target, toolchain, log), folder, target, "--dry-run")
    if code != 0:
        raise ToolchainError(
            f"llama.cpp can't convert {skeleton.name}: {local.last_lines(log)}",
            f"Use a base model that it supports; its full output is in {log}.",
        )


def tensor_plans(
    skeleton: ModelSkeleton, gguf_type: str, log: Path, reporter: Reporter
) -> dict[str, conversion_plan.TensorPlan]:
    """Return how each tensor of a model's GGUF is made, by the model's tensors; {} when there is no conversion plan."""
    plan = plan_cache.find_plan(skeleton, gguf_type, llamacpp.ensure(reporter), log).plan
    return {} if plan is None else {each.source: each for each in plan.tensors if each.source is not None}


def expected_header(skeleton: ModelSkeleton, gguf_type: str, log: Path, reporter: Reporter) -> bytes:
    """Return the header of the GGUF that a model will give, or as much of it as has the tokenizer; no weights are read.

    Raises:
        ToolchainError: llama.cpp can't convert the tokenizer.
    """
    toolchain = llamacpp.ensure(reporter)
    plan = plan_cache.find_plan(skeleton, gguf_type, toolchain, log).plan
    if plan is not None:
        return _with_bos(plan, skeleton).header
    with plan_cache.temporary_folder(skeleton) as folder:
        target = folder.with_name("vocabulary.gguf")
        _convert_by_converter(_Conversion(skeleton, gguf_type, target, toolchain, log), folder, target, "--vocab-only")
        content, adds_bos = target.read_bytes(), _adds_bos(skeleton)
    return content if adds_bos is None else header.with_flag(content, _ADD_BOS, adds_bos)


def _exact_type(entries: Mapping[str, Entry], reporter: Reporter) -> str:
    gguf_type = conversion_plan.exact_type(entries)
    if gguf_type == "f32":
        reporter.warning("weights of several types: the unquantized GGUF is written in f32, which holds all exactly")
    return gguf_type


def _with_bos(plan: conversion_plan.ConversionPlan, skeleton: ModelSkeleton) -> conversion_plan.ConversionPlan:
    """The converter believes tokenizer.json's post-processor, which the chats were not encoded with."""
    adds_bos = _adds_bos(skeleton)
    if adds_bos is None:
        return plan
    return dataclasses.replace(plan, header=header.with_flag(plan.header, _ADD_BOS, adds_bos))


def _convert_by_converter(conversion: _Conversion, model: Path, target: Path, *options: str) -> None:
    if _run_converter(conversion, model, target, *options) != 0 or not target.is_file():
        cause = f"llama.cpp's converter failed: {local.last_lines(conversion.log)}"
        raise ToolchainError(cause, f"The log is {conversion.log}.")


def _run_converter(conversion: _Conversion, model: Path, target: Path, *options: str) -> int:
    paths = [str(path.absolute()) for path in (conversion.toolchain.converter, model, target)]
    return child_process.run(
        "kolotune.gguf.converter",
        *(*paths[:2], conversion.gguf_type, paths[2], *options),
        log=conversion.log,
        otherwise=ToolchainError,
        env=plan_cache.OFFLINE,
    )


def _convert_temporary_folder(conversion: _Conversion, model: MergedModel, target: Path) -> None:
    parent = target.with_name(f".{conversion.skeleton.name}.partial")
    remove(parent)
    try:
        parent.mkdir(parents=True)
        folder = conversion.skeleton.write(parent)
        write_shards(folder, conversion.skeleton.shards, model.blocks)
        _convert_by_converter(conversion, folder, target)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _checked(conversion: _Conversion, written: Path, *, streamed: bool) -> JsonObject:
    """Check the GGUF's form, and that template and BOS are those of training; return facts for the record."""
    skeleton, shown = conversion.skeleton, conversion.target
    summary = header.read(written)
    adds_bos = _adds_bos(skeleton)
    if adds_bos is not None and summary.fields.get(_ADD_BOS, adds_bos) != adds_bos:
        header.set_flag(written, _ADD_BOS, adds_bos)
        summary = header.read(written)
    form = writer_form.wanted_form()
    if form is writer_form.Form.WRITER and not writer_form.is_in_form(summary):
        raise ToolchainError(
            f"{shown}: the converter did not write it in the form of llama.cpp's own writer",
            f"Its gguf-py is another than was expected; {writer_form.SWITCH}=converter accepts it as it is.",
        )
    template = summary.fields.get("tokenizer.chat_template")
    if TEMPLATE_FILE in skeleton.files and template != skeleton.text(TEMPLATE_FILE):
        raise ArtifactError(f"{shown}: its chat template is not the one that was trained with")
    if adds_bos is not None and bool(summary.fields.get(_ADD_BOS, adds_bos)) != adds_bos:
        raise ArtifactError(f"{shown}: its BOS is not the one that was trained with")
    if not streamed:  # the library has loaded only a vocabulary of it; see `prove`
        load_proof.prove_loadable(written, conversion.log)
    return {
        "architecture": summary.architecture,
        "tensors": len(summary.tensors),
        "type": conversion.gguf_type,
        "toolchain": conversion.toolchain.version,
        "streamed": streamed,
        writer_form.FACT: form.value,
    }


def _adds_bos(skeleton: ModelSkeleton) -> bool | None:
    """Whether a server has to add a BOS; None when the folder does not say."""
    if _TOKENIZER_CONFIG not in skeleton.files:
        return None
    value = typed_storage.parse_object(skeleton.text(_TOKENIZER_CONFIG)).get("add_bos_token")
    return value if isinstance(value, bool) else None
