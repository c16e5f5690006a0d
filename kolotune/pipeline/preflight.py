"""Checks before the first stage runs: what is known to fail later is refused now."""

from __future__ import annotations

from collections.abc import Sequence

from kolotune.fidelity import computation_gate, prompt_gate
from kolotune.foundation.reporter import Reporter
from kolotune.planning import fit
from kolotune.planning.workload import Workload, describe_workload, read_workload
from kolotune.run_folder.stage import Context, Stage
from kolotune.stages import convert, modelfile, prepare, quantize, train

from .first_start import proven_meanwhile


def check_stages(stages: Sequence[Stage], context: Context, reporter: Reporter) -> None:
    """Check that stages can run: each asks what it needs, and disk and memory must hold what they make.

    Raises:
        KolotuneError: one of them would fail; nothing was changed.
    """
    if train in stages:
        check_capacity([train], context)  # takes no time, so it comes first
    with proven_meanwhile(stages, context, reporter):
        for stage in stages:
            stage.preflight(context, reporter)
    if train in stages and (convert in stages or quantize in stages):
        computation_gate.check_computation(context, reporter)
    if prepare in stages:
        _check_prompts(stages, context, reporter, is_prepared=False)
    if stages:
        check_capacity(stages, context)


def check_capacity(stages: Sequence[Stage], context: Context, workload: Workload | None = None) -> None:
    """Check that disk and memory can hold what the stages make.

    Args:
        stages: those that run.
        context: of the run.
        workload: of the training; None while the chats are not prepared: then the smallest possible one counts.

    Raises:
        SpaceError: they can't; it says what to change.
    """
    fit.require_fit(context, {stage.NAME for stage in stages}, context.run.log("plan"), workload)


def check_training(stages: Sequence[Stage], context: Context, reporter: Reporter) -> None:
    """Check again, with the chats prepared, that training fits and that the chats will be served as they are trained.

    Raises:
        SpaceError, TemplateError, ToolchainError: they won't.
    """
    if context.run.prepared.is_dir():
        workload = read_workload(context.run.prepared, context.config, context.run.log("plan"))
        reporter.note(describe_workload(workload, context.config))
        check_capacity([train], context, workload)
        _check_prompts(stages, context, reporter, is_prepared=True)


def _check_prompts(stages: Sequence[Stage], context: Context, reporter: Reporter, *, is_prepared: bool) -> None:
    if train in stages and modelfile in stages:
        traits = prompt_gate.recorded_traits(context.run) if is_prepared else None
        prompt_gate.check_prompts(context, reporter, traits, is_prepared=is_prepared)
