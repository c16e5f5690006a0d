"""quantize: unquantized GGUF → one GGUF for each quantization.

A lean run makes the unquantized GGUF here too, from base and adapter, and removes it when all quantizations are made.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kolotune import llamacpp
from kolotune.foundation import typed_storage
from kolotune.foundation.config import OPTIONS, Config, plain_values
from kolotune.foundation.errors import ArtifactError, ConfigError
from kolotune.foundation.files import remove
from kolotune.foundation.formatting import format_size
from kolotune.foundation.quantization_budgets import read_budget
from kolotune.foundation.quantization_types import NEEDS_IMPORTANCE_MATRIX, is_made_with_matrix
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.gguf import base_grid, conversion_source, header, quantize, run_compensation, run_matrix
from kolotune.gguf.budgets import BudgetQuantizer, ChosenMixtures, ChosenTypes, read_mixtures
from kolotune.gguf.run_compensation import Compensation
from kolotune.run_folder.records import read_record
from kolotune.run_folder.results import QuantizedFile, quantize_facts
from kolotune.run_folder.retention import kept_models
from kolotune.run_folder.stage import Context

NAME = run_matrix.QUANTIZE
DOING = "quantizing"
_SHOWN_SIZES = 9


def options(config: Config) -> JsonObject:
    kept = kept_models(config)
    names: tuple[str, ...] = ("quantization",) if kept.unquantized else ("quantization", "lean", "merge_dtype")
    with_matrix = [name for name in kept.quantized if is_made_with_matrix(name, config.importance_matrix)]
    names += ("quantizer",) if config.quantizer != OPTIONS["quantizer"].default else ()
    return plain_values(config, names) | ({"importance_matrix": with_matrix} if with_matrix else {})


def inputs(context: Context) -> dict[str, Path]:
    is_kept = kept_models(context.config).unquantized
    source = {"the unquantized GGUF": context.run.gguf} if is_kept else conversion_source.conversion_inputs(context)
    reads_chats = bool(_made_with_matrix(context) or _budgets(context)) or context.config.quantizer == "compensated"
    return source | ({"the prepared chats": context.run.prepared} if reads_chats else {})


def outputs(context: Context) -> list[Path]:
    kept = kept_models(context.config)
    files = [context.run.quantized(name) for name in kept.quantized]
    files += [context.run.importance_matrix] if _made_with_matrix(context) else []
    files += [context.run.tensor_types] if _budgets(context) else []
    return files if kept.unquantized else [*files, *conversion_source.tokenizer_outputs(context)]


def packages() -> Sequence[str]:
    return ("xllamacpp",)


def preflight(context: Context, reporter: Reporter) -> None:
    """Check that llama.cpp is installed, and that the model's weights fit the quantizations.

    Raises:
        ConfigError: a quantization needs whole blocks that the model's rows don't fill; or it needs an importance
            matrix, and what is exported was not trained here.
    """
    kept = kept_models(context.config)
    needs_matrix = [name for name in kept.quantized if name in NEEDS_IMPORTANCE_MATRIX]
    if needs_matrix and needs_matrix[0] not in _made_with_matrix(context):
        raise ConfigError(
            f"quantization {needs_matrix[0]}: needs an importance matrix, which is computed from the training chats, "
            "and this model was trained elsewhere",
            "Choose another; Q2_K and IQ3_S are next in size.",
        )
    if kept.quantized:
        llamacpp.ensure(reporter)
    if kept.quantized and context.source is None:
        _note_grid(context, reporter)
    if not kept.unquantized:
        conversion_source.prove_convertible(context, reporter)
    if _budgets(context):
        conversion_source.check_budgets(context, kept.quantized, context.run.log(NAME), reporter)
    if kept.quantized and context.config.quantizer == "compensated":
        plans = conversion_source.expected_tensor_plans(context, context.run.log(NAME), reporter)
        run_compensation.check_possible(context, plans, context.run.log(NAME))
    quantize.check_blocks(context.base, kept.quantized)


def _note_grid(context: Context, reporter: Reporter) -> None:
    """Say where the base's weights lie on a grid that some types round the training back to."""
    grid = base_grid.find_grid(context.base, context.run.log(NAME))
    if grid is not None:
        erasing = ", ".join(f"{kind} ({grid.change_kept[kind]:.0%} is left)" for kind in grid.erasing)
        reporter.note(
            f"the base model's weights lie on a quantization grid: rounding to {erasing} takes back what training "
            f"changes, as far as a quantization uses it; {', '.join(grid.keeping) or 'no other type'} keep it"
        )


def run(context: Context, reporter: Reporter) -> JsonObject:
    """Make the missing GGUFs; keep those that were made before from the same unquantized GGUF, remove others.

    Raises:
        ToolchainError: a quantization does not fit the model, or the quantizer failed.
        ArtifactError: the unquantized GGUF is missing, or what the quantizer wrote is damaged.
    """
    folder, hasher, names = context.run, context.hasher, kept_models(context.config).quantized
    previous = quantize_facts(read_record(folder, NAME))
    with _unquantized_gguf(context, reporter) as facts:
        source = hasher.of(folder.gguf)
        matrix = _importance_matrix(context, previous.importance_matrix, reporter)
        matrices = {name: matrix["sha256"] for name in _made_with_matrix(context)}
        compensation = conversion_source.find_compensation(context, folder.log(NAME), reporter)
        if compensation is None:
            remove(folder.compensated_blocks)
        calibration = compensation.digest if compensation else None
        budgets = _budget_quantizer(context, compensation, reporter)

        def wanted(name: str, sha256: str = "") -> QuantizedFile:
            choice = budgets.key if budgets is not None and name in _budgets(context) else None
            return QuantizedFile(source, sha256, matrices.get(name), calibration, choice)

        chosen = _chosen_before(context)
        files = {
            name: file
            for name, file in previous.made.items()
            if _is_current(name, file, wanted(name), context, reporter)
            and (name in chosen or name not in _budgets(context))
        }
        for name in names:
            if name not in files:
                reporter.doing(f"quantizing to {name}")
                target = folder.quantized(name)
                if budgets is not None and name in _budgets(context):
                    chosen[name] = budgets.make(name, target, hasher)
                    _note_choice(name, chosen[name], reporter)
                else:
                    imatrix = folder.importance_matrix if name in matrices else None
                    log = folder.log(NAME)
                    quantize.quantize_file(folder.gguf, target, name, log, reporter, imatrix, hasher, compensation)
                files[name] = wanted(name, hasher.of(target))
        _keep_choices(context, budgets, {name: chosen[name] for name in _budgets(context)}, reporter)
    return {
        "made": {name: _as_fact(file) for name, file in files.items()},
        **({"importance_matrix": matrix} if matrix else {}),
        **facts,
    }


def _is_current(name: str, file: QuantizedFile, wanted: QuantizedFile, context: Context, reporter: Reporter) -> bool:
    """Whether a GGUF is what would be made now; if not, remove it, with its Modelfile where that changes too."""
    path, is_requested = context.run.quantized(name), name in kept_models(context.config).quantized
    is_same_source = file.source == wanted.source and (
        not is_requested or dataclasses.replace(file, sha256=wanted.sha256) == wanted
    )
    if is_same_source and context.hasher.of(path) == file.sha256:
        return True
    if path.exists() and not is_requested:
        reporter.note(f"{path.name} was made from an earlier training and is removed")
    remove(path)
    if not is_same_source or not is_requested:
        remove(context.run.modelfile(name))
    return False


def _budgets(context: Context) -> list[str]:
    return [name for name in kept_models(context.config).quantized if read_budget(name) is not None]


def _budget_quantizer(
    context: Context, compensation: Compensation | None, reporter: Reporter
) -> BudgetQuantizer | None:
    """Return what makes the quantizations to a budget; None where there are none."""
    run, budgets = context.run, _budgets(context)
    if not budgets:
        remove(run.sensitivity)
        return None
    matrix = run.importance_matrix if budgets[0] in _made_with_matrix(context) else None
    return conversion_source.find_budgets(
        context, run.gguf, run.sensitivity, run.log(NAME), reporter, matrix, compensation
    )


def _chosen_before(context: Context) -> dict[str, ChosenTypes]:
    """Return what was chosen for the files that are there, where their headers agree."""
    mixtures = read_mixtures(context.run)
    chosen = {}
    for name, choice in mixtures.chosen.items() if mixtures else ():
        path = context.run.quantized(name)
        with suppress(ArtifactError, OSError):
            types = {tensor: info.type for tensor, info in header.read(path).tensors.items()}
            if choice.types.items() <= types.items() and choice.size == path.stat().st_size:
                chosen[name] = choice
    return chosen


def _keep_choices(
    context: Context, budgets: BudgetQuantizer | None, chosen: dict[str, ChosenTypes], reporter: Reporter
) -> None:
    if budgets is None:
        remove(context.run.tensor_types)
    else:
        mixtures = dataclasses.replace(budgets.mixtures, chosen=chosen)
        typed_storage.write(context.run.tensor_types, mixtures)
        _show_curve(mixtures, reporter)


def _show_curve(mixtures: ChosenMixtures, reporter: Reporter) -> None:
    """Show what some sizes are predicted to cost."""
    last = len(mixtures.curve) - 1
    shown = sorted({mixtures.knee, *(last * number // (_SHOWN_SIZES - 1) for number in range(_SHOWN_SIZES))})
    reporter.table(
        "Sizes, and the mean KL divergence that is predicted for them",
        ("size", "bytes", "KL mean", "knee"),
        [
            (format_size(point.size), str(point.size), f"{point.kl:.2e}", "yes" if number == mixtures.knee else "")
            for number, point in enumerate(mixtures.curve)
            if number in shown
        ],
    )


def _note_choice(name: str, chosen: ChosenTypes, reporter: Reporter) -> None:
    counts = Counter(chosen.types.values()).most_common()
    listed = ", ".join(f"{kind} ({count})" for kind, count in counts)
    reporter.note(f"{name}: matrices by type: {listed}; predicted mean KL {chosen.predicted_kl:.2e}")


def _as_fact(file: QuantizedFile) -> dict[str, str]:
    return {name: value for name, value in dataclasses.asdict(file).items() if value is not None}


def _made_with_matrix(context: Context) -> list[str]:
    return run_matrix.with_matrix(context, kept_models(context.config).quantized)


def _importance_matrix(context: Context, previous: Mapping[str, str], reporter: Reporter) -> dict[str, str]:
    """Make the importance matrix, unless an earlier run made it from the same model and chats.

    Returns:
        What it was made from, and its hash; empty where no quantization needs one.
    """
    path, hasher = context.run.importance_matrix, context.hasher
    if not _made_with_matrix(context):
        remove(path)
        return {}
    if {**previous} != run_matrix.matrix_facts(context, context.run.gguf, hasher.of(path)):
        run_matrix.make_matrix(context.run.gguf, context.run.prepared, path, context.run.log(NAME), reporter, hasher)
    return run_matrix.matrix_facts(context, context.run.gguf, hasher.of(path))


@contextmanager
def _unquantized_gguf(context: Context, reporter: Reporter) -> Iterator[JsonObject]:
    """Provide the unquantized GGUF for the duration of the block; yield facts about it when it is not kept."""
    gguf = context.run.gguf
    if kept_models(context.config).unquantized:
        if not gguf.is_file():
            raise ArtifactError(f"{gguf}: there is no GGUF to quantize", "Run `kolotune convert` first.")
        yield {}
        return
    reporter.doing("converting to GGUF; the file is removed after quantizing")
    facts = conversion_source.make_gguf(context, gguf, context.run.log(NAME), reporter)
    try:
        yield {"unquantized": {**facts, "sha256": context.hasher.of(gguf)}}
    finally:
        remove(gguf)
