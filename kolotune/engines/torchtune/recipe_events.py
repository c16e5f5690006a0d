"""What the recipe reports to its driver; see `inside.kolotune_recipe.events`, which has no kolotune to import."""

from __future__ import annotations

from dataclasses import dataclass

from ..events import EvaluationDone, StepDone


@dataclass(frozen=True)
class RecipeStarted:
    """Training starts or resumes.

    Attributes:
        device, processes: what trains.
        epoch, step: done so far.
        halvings: see `TrainJob`.
    """

    device: str
    processes: int
    epoch: int
    step: int
    halvings: list[int]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was written after an epoch."""

    epoch: int
    step: int


@dataclass(frozen=True)
class ProcessLost:
    """torchrun gives up, because a process or a machine is lost for good."""

    text: str


@dataclass(frozen=True)
class ProcessesRestarted:
    """torchrun has restarted the processes of this machine."""


@dataclass(frozen=True)
class RecipeError:
    """The recipe failed.

    Attributes:
        kind: "memory", "not finite", "disagreement" or "other".
        text: the cause; of a disagreement, the names of the settings.
    """

    kind: str
    text: str


RECIPE_EVENTS = {
    "started": RecipeStarted,
    "step": StepDone,
    "evaluation": EvaluationDone,
    "checkpoint": CheckpointSaved,
    "lost": ProcessLost,
    "again": ProcessesRestarted,
    "error": RecipeError,
}
"""The classes of the events, by their names in the recipe's output."""
