"""A model that is measured in fp32, by the packed passes where they are proven, else by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kolotune.engines.exact_model import Watch

from .packed_reference import open_packed_reference
from .tasks import ComparedChat, ModelsTask

if TYPE_CHECKING:
    import numpy as np


class MeasuredModel(Protocol):
    """A model in fp32."""

    def close(self) -> None:
        """Free the memory."""

    def add(self, folder: Path) -> None:
        """Add an adapter.

        Raises:
            ArtifactError, ModelError: it can't be read, or is for a different model.
        """

    def read(self, folder: Path) -> bool:
        """Take over the weights in another folder, such as a merged model's, in place of this model's own.

        Returns:
            Whether this is possible: where settings or the names of weights differ, nothing is changed.

        Raises:
            ArtifactError: a file is damaged.
        """

    def log_probabilities(self, chats: Sequence[ComparedChat]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each chat's index with its predictions at its positions, fp32 ``[positions, vocabulary]``."""

    def losses(self, chats: Sequence[ComparedChat]) -> list[float]:
        """Return the loss of each chat, summed over its trained tokens, by their weights."""

    def answers(self, prompts: Sequence[Sequence[int]], end: int, longest: int) -> list[list[int] | None]:
        """Return the ids of greedy answers, which end with the end token if they end; None: too slow."""

    def watch(self, watches: Mapping[str, Watch]) -> None:
        """Show what some linear modules compute, by their names, until this is called again; others have no inputs."""


def open_measured(task: ModelsTask, chats: Sequence[ComparedChat]) -> MeasuredModel:
    """Open the base of a task.

    Raises:
        ArtifactError, ModelError, SpaceError: it can't be opened, or a weight is missing.
    """
    from .memory_needed import fits_into_memory

    if task.is_packed and fits_into_memory(Path(task.base)):
        packed = open_packed_reference(Path(task.base), task.adapter, max(len(chat.ids) for chat in chats))
        if packed is not None:
            return packed
    return open_by_transformers(Path(task.base))


def open_by_transformers(folder: Path) -> MeasuredModel:
    """Open a model with transformers.

    Raises:
        ArtifactError, SpaceError: see `reference_model.open_model`.
    """
    from .reference_model import open_model

    return open_model(folder)
