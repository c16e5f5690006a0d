"""Run the pipeline: select the stages that have work, run them, record them."""

from __future__ import annotations

import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kolotune.base_models.new_tokens import resolve_base
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import FidelityError, Interrupted, KolotuneError
from kolotune.foundation.files import explained, remove, size_of, write_text
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.cleaned import forget_cleaned
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import write_manifest
from kolotune.run_folder.marks import MarkState, remove_mark, write_mark
from kolotune.run_folder.reasons import Reason, find_reasons
from kolotune.run_folder.records import now, write_record
from kolotune.run_folder.retention import kept_models, stages_skipped_by_lean
from kolotune.run_folder.source import write_source
from kolotune.run_folder.stage import Context, Stage
from kolotune.stages import compare, train

from .choices import choose, choose_experts, follow_start, write_choices
from .first_start import fetched_meanwhile
from .lock import locked
from .preflight import check_stages, check_training
from .reason_text import format_cleaned, format_reason
from .selection import StageSelection, cleaned_outputs, select_stages
from .stages import STAGE_NAMES, STAGES, stages_of


def run_pipeline(
    config: Config,
    reporter: Reporter,
    names: Collection[str] = STAGE_NAMES,
    source: Path | None = None,
    *,
    restore: Sequence[str] = (),
    check_also: Sequence[str] = (),
) -> RunFolder:
    """Run stages in the run folder of `config`, each only if something that it depends on changed.

    Args:
        config: the resolved options.
        reporter: where progress and results are reported.
        names: the stages, in any order; those that the config skips are skipped.
        source: adapter or merged folder made elsewhere, in place of what the run's own stages made.
        restore: stages whose cleaned outputs are made again; see `select_stages`.
        check_also: stages that will run later, here or in another folder: they are checked now.

    Returns:
        The run folder.

    Raises:
        KolotuneError: see `errors`.
    """
    folder = RunFolder(config.output_dir)
    with locked(folder), _traceback_kept(folder):
        with fetched_meanwhile(config, folder, names, reporter):
            base = resolve_base(config, reporter)
        config, choices = choose(config, folder, names)
        context = Context(config, folder, base, source)
        if train.NAME in names:
            context, choices = choose_experts(follow_start(context), choices, reporter)
            config = context.config
        selection, later = select_stages(names, context, restore), select_stages(check_also, context)
        pending = selection.pending
        check_stages([*pending, *later.stages] if pending else later.pending, context, reporter)
        # Only now: a run that was refused changes nothing in the folder.
        write_choices(folder, choices)
        write_text(folder.config, configs.dump(config))
        write_source(folder, source)
        forget_cleaned(folder, [path for stage in selection.restored for path in stage.outputs(context)])
        is_settled = not _remove_models_not_kept(context, reporter)
        with _manifest_at_end(context):
            _run_selected(selection, later.stages, is_settled, context, reporter)
    return folder


def _run_selected(
    selection: StageSelection, later: Sequence[Stage], is_settled: bool, context: Context, reporter: Reporter
) -> None:
    """Run the stages in order.

    Args:
        selection: the stages, and why they run.
        later: stages that will run later; see `run_pipeline`.
        is_settled: whether the files are still those that the selection saw. Once a stage has run they are not, and
            the reasons of the stages after it are found again.
        context, reporter: see `Stage.run`.
    """
    for stage in selection.stages:
        is_settled = is_settled and stage not in selection.restored
        reasons = selection.reasons[stage.NAME] if is_settled else find_reasons(stage, context)
        if not reasons:
            cleaned = cleaned_outputs(stage, context)
            detail = format_cleaned(cleaned) if cleaned else "nothing it depends on has changed"
            reporter.success(f"{stage.NAME}: done before, {detail}")
            continue
        if stage is train:
            check_training([*selection.stages, *later], context, reporter)
        _run_stage(stage, reasons, context, reporter)
        is_settled = False


def _run_stage(stage: Stage, reasons: Sequence[Reason], context: Context, reporter: Reporter) -> None:
    """Run a stage and write its record; while it is not done, a mark says how far it came."""
    reporter.doing(f"{stage.NAME}: {stage.DOING} ({'; '.join(map(format_reason, reasons))})")
    started, clock = now(), time.monotonic()
    write_mark(context.run, stage.NAME, MarkState.RUNNING)
    try:
        write_record(stage, context, stage.run(context, reporter), started)
    except KolotuneError as error:
        _mark_failed(context, stage, error)
        raise
    except KeyboardInterrupt:
        write_mark(context.run, stage.NAME, MarkState.INTERRUPTED)
        raise Interrupted(f"stopped during {stage.NAME}") from None
    except OSError as error:
        explanation = explained(error, Path(error.filename or context.run.root))
        _mark_failed(context, stage, explanation)
        raise explanation from error
    remove_mark(context.run, stage.NAME)
    outputs = ", ".join(f"{path.name} ({format_size(size_of(path))})" for path in stage.outputs(context))
    reporter.success(f"{stage.NAME}: {outputs or 'nothing to make'} in {time.monotonic() - clock:.1f} s")


def _mark_failed(context: Context, stage: Stage, error: KolotuneError) -> None:
    with suppress(KolotuneError):  # on a full disk the first error is the one to report
        write_mark(context.run, stage.NAME, MarkState.FAILED, error.cause)


def _remove_models_not_kept(context: Context, reporter: Reporter) -> bool:
    """Remove what a lean run does not keep, with its records; everything can be made again from what is kept.

    Returns:
        Whether there was anything to remove.
    """
    skipped = [stage for stage in STAGES if stage.NAME in stages_skipped_by_lean(context.config)]
    has_removed = any(context.run.record(stage.NAME).exists() for stage in skipped)
    for stage in skipped:
        for path in stage.outputs(context):
            if path.exists():
                reporter.note(f"{path.name} is removed: a lean run does not keep it")
                remove(path)
                has_removed = True
        forget_cleaned(context.run, stage.outputs(context))
        remove(context.run.record(stage.NAME))
        remove_mark(context.run, stage.NAME)
    if not kept_models(context.config).unquantized:
        remove(context.run.modelfile())
    return has_removed


@contextmanager
def _manifest_at_end(context: Context) -> Iterator[None]:
    """Write the manifest when all stages are done, and also when only the comparison failed."""
    try:
        yield
    except FidelityError:
        write_manifest([stage for stage in stages_of(context) if stage is not compare], context)
        raise
    write_manifest(stages_of(context), context)


@contextmanager
def _traceback_kept(folder: RunFolder) -> Iterator[None]:
    """Log where an expected error came from; the screen shows only its cause and what to do."""
    try:
        yield
    except KolotuneError:
        with suppress(OSError):
            folder.logs.mkdir(parents=True, exist_ok=True)
            with folder.log("error").open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(f"{now()}\n{traceback.format_exc()}\n")
        raise
