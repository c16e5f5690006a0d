"""What a run converts: a merged folder, or base and adapter; known before training too, for the dry conversion."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.tokens.tokenizer import named_tokens, trained_tokenizer, writes_bos
from kolotune.chats.tokens.trained_template import trained_template
from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.files import replacing
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.retention import kept_models
from kolotune.run_folder.stage import Context
from kolotune.weights.adapter_folder import is_adapter
from kolotune.weights.mapped_tensors import MappedTensors
from kolotune.weights.merge import MergedModel, companion_files, tokenizer_folder
from kolotune.weights.weight_files import weight_files

from . import convert
from .budgets import BudgetQuantizer, check_possible, choice_basis
from .conversion_plan import TensorPlan, exact_type
from .model_skeleton import ModelSkeleton, read_skeleton
from .run_compensation import Compensation, run_compensation


def source_folder(context: Context) -> Path | None:
    """Return the merged model, of the run or made elsewhere; None when base and adapter are converted directly."""
    if context.source is not None and not is_adapter(context.source):
        return context.source
    return context.run.merged_model if kept_models(context.config).merged else None


def conversion_inputs(context: Context) -> dict[str, Path]:
    """Return what the unquantized GGUF is made from, by the labels in records."""
    folder = source_folder(context)
    if folder is not None:
        return {"the merged model": folder}
    return {
        "the adapter": context.source or context.run.adapter,
        "the base model": context.base,
        "the tokenizer": _tokenizer(context),
    }


def _tokenizer(context: Context) -> Path:
    return context.run.tokenizer if context.source is None else tokenizer_folder(context.source, context.base)


def tokenizer_outputs(context: Context) -> list[Path]:
    """Return the tokenizer folder that a lean export of an adapter made elsewhere keeps; [] for other runs."""
    lean = source_folder(context) is None
    return [context.run.exported_tokenizer] if lean and context.source is not None else []


def make_gguf(context: Context, target: Path, log: Path, reporter: Reporter) -> JsonObject:
    """Make the unquantized GGUF of a run; see `convert.convert_folder` and `convert.convert_adapter`."""
    folder = source_folder(context)
    if folder is not None:
        return convert.convert_folder(folder, target, log, reporter, hasher=context.hasher)
    for path in tokenizer_outputs(context):
        with replacing(path) as partial:
            partial.mkdir()
            for name, source in companion_files(context.base, _tokenizer(context)).items():
                shutil.copyfile(source, partial / name)
    return convert.convert_adapter(
        context.source or context.run.adapter,
        context.base,
        _tokenizer(context),
        dtype=context.config.merge_dtype,
        name=context.run.merged_model.name,
        target=target,
        log=log,
        reporter=reporter,
        hasher=context.hasher,
    )


def prove_convertible(context: Context, reporter: Reporter) -> None:
    """Prove on the base model, before hours of training, that llama.cpp can convert the result.

    The skeleton is the result's as far as it is known, so that its conversion plan is in the cache afterwards.

    Raises:
        ToolchainError: llama.cpp can't.
    """
    skeleton, gguf_type = expected_skeleton(context)
    convert.prove(skeleton, gguf_type, context.run.log("dry_conversion"), reporter)


def expected_skeleton(context: Context, *, is_prepared: bool = True) -> tuple[ModelSkeleton, str]:
    """Return what will be converted, as far as it is known without an adapter, and the type of the GGUF.

    Args:
        context: of the run.
        is_prepared: the run's tokenizer, where it has one, is that of its chats; False: they will be prepared again.
    """
    folder = source_folder(context)
    if context.source is not None and folder == context.source:
        return read_skeleton(folder), exact_type(MappedTensors(weight_files(folder)).entries)
    model = MergedModel(context.source, context.base, context.config.merge_dtype)
    companions: dict[str, Path | str | bytes]
    if context.source is not None:
        companions = {**companion_files(context.base, _tokenizer(context))}
    elif is_prepared and context.run.tokenizer.is_dir():
        companions = {**companion_files(context.base, context.run.tokenizer)}
    else:
        companions = {**companion_files(context.base, context.base), **_expected_tokenizer(context)}
    skeleton = convert.merged_skeleton(model, companions, context.run.merged_model.name)
    return skeleton, exact_type({entry.name: entry for entry in model.entries})


def tensor_plans(context: Context, log: Path, reporter: Reporter) -> dict[str, TensorPlan]:
    """Return how each tensor of a finished run's GGUF is made; see `convert.tensor_plans`."""
    run = context.run
    if run.merged_model.is_dir():
        entries = MappedTensors(weight_files(run.merged_model)).entries
        return convert.tensor_plans(read_skeleton(run.merged_model), exact_type(entries), log, reporter)
    model = MergedModel(context.source or run.adapter, context.base, context.config.merge_dtype)
    companions = companion_files(context.base, _tokenizer(context))
    skeleton = convert.merged_skeleton(model, companions, run.merged_model.name)
    return convert.tensor_plans(skeleton, exact_type({entry.name: entry for entry in model.entries}), log, reporter)


def expected_tensor_plans(context: Context, log: Path, reporter: Reporter) -> list[TensorPlan]:
    """Return how each tensor of a run's GGUF will be made; [] when there is no conversion plan."""
    return list(convert.tensor_plans(*expected_skeleton(context), log, reporter).values())


def find_compensation(context: Context, log: Path, reporter: Reporter) -> Compensation | None:
    """Return how the quantizations of a run are compensated; None where they are not.

    Raises:
        ArtifactError: the prepared chats are missing.
    """
    if context.config.quantizer != "compensated":
        return None
    return run_compensation(context, list(tensor_plans(context, log, reporter).values()))


def find_budgets(
    context: Context,
    source: Path,
    sensitivity: Path,
    log: Path,
    reporter: Reporter,
    matrix: Path | None,
    compensation: Compensation | None,
) -> BudgetQuantizer:
    """Return what makes the quantizations to a budget of a run's unquantized GGUF.

    Args:
        context: of the run, whose chats are prepared.
        source: the GGUF.
        sensitivity: the file that keeps what is measured.
        log, reporter: of the processes.
        matrix: the importance matrix; None: without one.
        compensation: how rounding errors are compensated; None: they are not.

    Raises:
        ArtifactError: the prepared chats are missing.
    """
    plans = list(tensor_plans(context, log, reporter).values())
    return BudgetQuantizer(source, sensitivity, choice_basis(context, plans), log, reporter, matrix, compensation)


def check_budgets(context: Context, names: Sequence[str], log: Path, reporter: Reporter) -> None:
    """Check before training that a run's quantizations to a budget can be made; see `budgets.check_possible`."""
    skeleton, gguf_type = expected_skeleton(context)
    plans = list(convert.tensor_plans(skeleton, gguf_type, log, reporter).values())
    content = convert.expected_header(skeleton, gguf_type, log, reporter) if plans else b""
    check_possible(context, names, plans, content, log)


def _expected_tokenizer(context: Context) -> dict[str, Path | str | bytes]:
    """Return the files that prepare will write; {} if it can't, which it reports itself."""
    try:
        tokens = named_tokens(context.base)
        jinja = trained_template(context.config, context.base, tokens)
        return trained_tokenizer(context.base, jinja, adds_bos=writes_bos(ChatTemplate(jinja, tokens), jinja))
    except KolotuneError:
        return {}
