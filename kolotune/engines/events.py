"""What an engine's process reports to the process that started it: one dataclass for each event.

An event travels as a line of JSON on standard output; see `runners.child_process`, which also carries errors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TypeAlias

from kolotune.foundation import typed_storage
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners import child_process

from .memory import Memory


@dataclass(frozen=True)
class TrainingBegins:
    """Training starts or resumes; it is sent again after processes were restarted.

    Attributes:
        step: steps done.
        halvings: see `TrainJob`.
    """

    step: int
    halvings: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class StepDone:
    """A step is done: its number from 1, the number of all steps, the mean loss of its labels, and the speed.

    The speed counts the tokens of the step's chats. A prefix that chats share counts in each; one that sequences of a
    chat share counts once, whatever the engine computes.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float


@dataclass(frozen=True)
class EvaluationDone:
    """The held-out chats were evaluated after `step` steps.

    Attributes:
        step: steps done.
        held_out_loss: the mean loss of their labels, or of a preference objective.
        held_out_accuracy: of a preference objective: the share of answers that are on the right side.
    """

    step: int
    held_out_loss: float
    held_out_accuracy: float | None = None


@dataclass(frozen=True)
class TrainingNote:
    """A sentence for the user."""

    text: str


@dataclass(frozen=True)
class TrainingResult:
    """Training is done and the adapter written. Facts that are None are unknown and not sent.

    Attributes:
        steps: steps done in all.
        stopped_early: whether the held-out loss ended the training before its last epoch.
        device, processes: what trained.
        threads, instructions, kernels: what the last bits of the result depend on besides.
    """

    steps: int
    stopped_early: bool
    device: str | None = None
    processes: int | None = None
    threads: int | None = None
    instructions: str | None = None
    kernels: str | None = None

    def facts(self) -> JsonObject:
        """Return the facts that are known, as they enter the train stage's record."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class OutOfMemory:
    """A process ran out of memory; the training can resume with smaller micro-batches."""


@dataclass(frozen=True)
class Calibration:
    """Measured steps of a training: seconds and bytes.

    Attributes:
        start: from the start of the process to the first step.
        first: the first step, on the chats with most tokens.
        per_token: of the later steps.
        per_held_out_token: of an evaluation.
        checkpoint: writing one.
        device: what computed.
        memory: peak of the process, with mapped files.
        mapped: of mapped files.
    """

    start: float
    first: float
    per_token: float
    per_held_out_token: float
    checkpoint: float
    device: str
    memory: int
    mapped: int

    @property
    def process_memory(self) -> Memory:
        return Memory(self.memory - self.mapped, self.mapped)


TrainingEvent: TypeAlias = (
    TrainingBegins | StepDone | EvaluationDone | TrainingNote | TrainingResult | OutOfMemory | Calibration
)
_KINDS: dict[str, type[TrainingEvent]] = {
    "begins": TrainingBegins,
    "step": StepDone,
    "evaluation": EvaluationDone,
    "note": TrainingNote,
    "result": TrainingResult,
    "out_of_memory": OutOfMemory,
    "measured": Calibration,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def emit(event: TrainingEvent) -> None:
    """Report an event to the process that started this one."""
    fields = event.facts() if isinstance(event, TrainingResult) else asdict(event)
    child_process.emit(_NAMES[type(event)], **fields)


def parse_event(name: str, fields: JsonObject) -> TrainingEvent | None:
    """Return the event with that name and those fields; None when the name is none of ours.

    Raises:
        StorageError: a field is missing or has a wrong type.
    """
    kind = _KINDS.get(name)
    return None if kind is None else typed_storage.convert(kind, fields)


def event_in(line: str) -> TrainingEvent | None:
    """Return the event in a line of an engine's output; None when the line is something else."""
    event = child_process.event_in(line)
    return None if event is None else parse_event(*event)
