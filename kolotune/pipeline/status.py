"""`kolotune status`: the state of each stage of a run, from its records and hashes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kolotune.foundation.config import Config
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.marks import Mark, MarkState, read_mark
from kolotune.run_folder.reasons import Reason, find_reasons

from .context import open_context
from .lock import is_locked
from .reason_text import format_cleaned, format_reason
from .selection import cleaned_outputs
from .stages import stages_of


class StageState(StrEnum):
    """The state of a stage, as `kolotune status` shows it."""

    DONE = "done"
    CLEANED = "cleaned"  # done, and its outputs were removed to free space
    WILL_RUN = "will run"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass(frozen=True)
class StageStatus:
    """The state of one stage, and what explains it.

    Attributes:
        name: of the stage.
        state: what has happened to it, and whether it has to run.
        reasons: why it has to run.
        waits_for: the first stage before it that has to run; "" for none.
        failure: the message of the error that ended it last; "" for none.
        cleaned: its outputs that were cleaned.
    """

    name: str
    state: StageState
    reasons: tuple[Reason, ...] = ()
    waits_for: str = ""
    failure: str = ""
    cleaned: tuple[str, ...] = ()

    @property
    def has_work(self) -> bool:
        """Whether the stage has to run."""
        return self.state not in (StageState.DONE, StageState.CLEANED)

    def explanations(self) -> list[str]:
        """Return sentences that explain the state, the most important first; none for a stage that is just done."""
        sentences = [self.failure] if self.failure else []
        sentences += map(format_reason, self.reasons)
        if self.waits_for and not self.reasons:
            sentences.append(f"{self.waits_for} runs before it")
        return sentences + ([format_cleaned(self.cleaned)] if self.cleaned else [])


def read_status(folder: RunFolder, config: Config | None = None) -> list[StageStatus]:
    """Return the state of each stage of a run.

    Args:
        folder: the run folder; hashes of files that have not been touched since the last time come from its cache.
        config: options to compare with; default: those that the run was made with.

    Raises:
        RunFolderError: it is not a run folder.
        ConfigError: its saved config can't be read.
    """
    context = open_context(folder, config, hash_cache=folder.hash_cache)
    stages: list[StageStatus] = []
    waits_for = ""
    for stage in stages_of(context):
        reasons = find_reasons(stage, context)
        if reasons or waits_for:
            mark = read_mark(folder, stage.NAME)
            failure = mark.cause if mark else ""
            stages.append(StageStatus(stage.NAME, _unfinished(mark, folder), tuple(reasons), waits_for, failure))
            waits_for = waits_for or stage.NAME
        else:
            cleaned = tuple(cleaned_outputs(stage, context))
            state = StageState.CLEANED if cleaned else StageState.DONE
            stages.append(StageStatus(stage.NAME, state, cleaned=cleaned))
    context.hasher.save()
    return stages


def _unfinished(mark: Mark | None, folder: RunFolder) -> StageState:
    if mark is None:
        return StageState.WILL_RUN
    if mark.state is MarkState.RUNNING and not is_locked(folder):
        return StageState.INTERRUPTED
    return StageState(mark.state.value)
