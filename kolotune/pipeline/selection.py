"""Which stages have work, and why: found out once, before any of them runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.run_folder.cleaned import read_cleaned
from kolotune.run_folder.reasons import Reason, find_reasons
from kolotune.run_folder.stage import Context, Stage

from .stages import STAGES, skipped_stages


@dataclass(frozen=True)
class StageSelection:
    """The stages of a run.

    Attributes:
        stages: those that were requested, and those whose cleaned outputs are needed; in order.
        reasons: why each has to run, by name; as it was before the first one ran.
        restored: the stages whose cleaned outputs are made again.
    """

    stages: list[Stage]
    reasons: dict[str, list[Reason]]
    restored: list[Stage]

    @property
    def pending(self) -> list[Stage]:
        """The stages from the first one on that has work; what it makes may give work to those after it."""
        for index, stage in enumerate(self.stages):
            if stage in self.restored or self.reasons[stage.NAME]:
                return self.stages[index:]
        return []


def select_stages(names: Iterable[str], context: Context, restore: Sequence[str] = ()) -> StageSelection:
    """Select the stages of a run.

    Args:
        names: the requested stages, in any order; those that the config skips are skipped.
        context: of the run.
        restore: stages whose outputs are made again when they were cleaned. Other stages stay cleaned unless a stage
            that has work reads their outputs.
    """
    skipped = skipped_stages(context.config)
    requested = [stage for stage in STAGES if stage.NAME in names and stage.NAME not in skipped]
    reasons = {stage.NAME: find_reasons(stage, context) for stage in requested}
    restored = _stages_to_restore(requested, reasons, context, restore)
    reasons |= {stage.NAME: find_reasons(stage, context) for stage in restored if stage.NAME not in reasons}
    stages = [stage for stage in STAGES if stage in requested or stage in restored]
    return StageSelection(stages, reasons, restored)


def cleaned_outputs(stage: Stage, context: Context) -> list[str]:
    """Return the names of those outputs of a stage that were cleaned."""
    cleaned = read_cleaned(context.run)
    return [name for name in map(context.run.relative, stage.outputs(context)) if name in cleaned]


def _stages_to_restore(
    requested: Sequence[Stage], reasons: dict[str, list[Reason]], context: Context, restore: Sequence[str]
) -> list[Stage]:
    """Return the stages whose outputs were cleaned and are needed: by name, or because a stage with work reads them."""
    cleaned = {context.run.root / name for name in read_cleaned(context.run)}
    if not cleaned:
        return []
    restored: list[Stage] = []
    needed: set[Path] = set()
    for stage in (stage for stage in reversed(STAGES) if stage.NAME not in skipped_stages(context.config)):
        outputs = cleaned & set(stage.outputs(context))
        if outputs & needed or (outputs and stage.NAME in restore):
            restored.append(stage)
        if stage in restored or (stage in requested and reasons[stage.NAME]):
            inputs = [{path, *path.parents} for path in stage.inputs(context).values()]
            needed |= {path for path in cleaned if any(path in each for each in inputs)}
    return restored
