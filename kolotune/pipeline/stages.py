"""The list of stages, in the order in which they run."""

from __future__ import annotations

from kolotune.foundation.config import Config
from kolotune.run_folder.records import read_record
from kolotune.run_folder.retention import stages_skipped_by_lean
from kolotune.run_folder.stage import Context, Stage
from kolotune.stages import compare, convert, merge, modelfile, prepare, quantize, train

STAGES: tuple[Stage, ...] = (prepare, train, merge, convert, quantize, modelfile, compare)
STAGE_NAMES = tuple(stage.NAME for stage in STAGES)


def skipped_stages(config: Config) -> frozenset[str]:
    """Return the stages that a run with these options does not have."""
    return stages_skipped_by_lean(config) | (frozenset() if config.compare else {compare.NAME})


def stages_of(context: Context) -> list[Stage]:
    """Return the stages that a run has; one that exports a model made elsewhere has those that it was made with."""
    stages = [stage for stage in STAGES if stage.NAME not in skipped_stages(context.config)]
    return [stage for stage in stages if context.source is None or read_record(context.run, stage.NAME) is not None]
