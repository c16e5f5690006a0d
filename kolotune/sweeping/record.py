"""`sweep.json`: what a sweep varies, and its trials so far. A stopped sweep resumes from it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ConfigError

from .space import Value, VariedOption

NAME = "sweep.json"


@dataclass
class Trial:
    """One setting: a run folder, and its result.

    Attributes:
        number: from 1.
        values: of the varied options, as `Config` takes them.
        loss: held-out loss of the adapter that was kept; None: not trained yet, or it failed.
        failure: why there is no loss; "" when it is not trained yet.
    """

    number: int
    values: dict[str, Value]
    loss: float | None = None
    failure: str = ""

    @property
    def folder(self) -> str:
        """The name of its run folder, in the sweep's folder."""
        return f"trial-{self.number:03d}"

    @property
    def has_ended(self) -> bool:
        """Whether it was trained, or failed."""
        return self.loss is not None or bool(self.failure)

    def describe(self) -> str:
        """Return its values, as "lora_rank 8, epochs 3"."""
        return ", ".join(f"{name} {value}" for name, value in self.values.items())


@dataclass
class SweepRecord:
    """What a sweep varies, and its trials in their order.

    Attributes:
        varied: the options.
        made_of: a digest of the chats and of the options that all trials share.
        trials: so far.
    """

    varied: list[VariedOption]
    made_of: str
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The trial with the smallest loss, the first of equal ones; None when none was trained."""
        trained = [(trial.loss, trial.number, trial) for trial in self.trials if trial.loss is not None]
        return min(trained, key=lambda entry: entry[:2])[2] if trained else None

    def write(self, folder: Path) -> None:
        typed_storage.write(folder / NAME, self)


def unfinished_trials(folder: Path) -> list[str]:
    """Return the run folders of trials that have not ended; none where there is no sweep."""
    with contextlib.suppress(OSError, typed_storage.StorageError):
        return [trial.folder for trial in typed_storage.read(SweepRecord, folder / NAME).trials if not trial.has_ended]
    return []


def read_or_create(folder: Path, varied: Sequence[VariedOption], made_of: str) -> SweepRecord:
    """Return the record of the sweep in `folder`, or a new one.

    Raises:
        ConfigError: the folder contains a different sweep.
    """
    try:
        record = typed_storage.read(SweepRecord, folder / NAME)
    except FileNotFoundError:
        return SweepRecord(list(varied), made_of)
    except (OSError, typed_storage.StorageError) as error:
        raise ConfigError(f"{folder / NAME}: can't be read: {error}", "Choose another --output-dir.") from None
    if record.varied != list(varied) or record.made_of != made_of:
        difference = "varies other values" if record.varied != list(varied) else "has other chats or options"
        raise ConfigError(
            f"{folder}: contains a sweep that {difference}",
            "Give the same chats and options to resume it, or another --output-dir.",
        )
    return record
