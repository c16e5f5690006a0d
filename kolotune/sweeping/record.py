"""`sweep.json`: what a sweep varies, and its trials so far; from it a sweep that was stopped goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import ConfigError
from kolotune.foundation.files import write_json

from .space import Varied

NAME = "sweep.json"


@dataclass
class Trial:
    """One setting: a run folder, and what came of it.

    Attributes:
        number: from 1.
        values: of the varied options, as they are given to `Config`.
        loss: held-out, of the adapter that was kept; None: not trained yet, or it failed.
        failure: why there is none.
    """

    number: int
    values: dict[str, Any]
    loss: float | None = None
    failure: str = ""

    @property
    def folder(self) -> str:
        """Its run folder, in that of the sweep."""
        return f"trial-{self.number:03d}"

    @property
    def is_over(self) -> bool:
        """Whether it was trained, or failed."""
        return self.loss is not None or bool(self.failure)


@dataclass
class Record:
    """What a sweep varies, and its trials in their order.

    Attributes:
        made_of: a digest of the chats and of the options that all trials share.
    """

    varied: list[Varied]
    made_of: str
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The trial with the smallest loss; of equal ones the first."""
        trained = [each for each in self.trials if each.loss is not None]
        return min(trained, key=lambda each: each.loss or 0.0) if trained else None

    def write(self, folder: Path) -> None:
        write_json(folder / NAME, dataclasses.asdict(self))


def not_over(folder: Path) -> list[str]:
    """The run folders of trials that have not ended, of the sweep in `folder`; none where there is no sweep."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        loaded = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return [each.folder for each in (Trial(**each) for each in loaded["trials"]) if not each.is_over]
    return []


def read(folder: Path, varied: Sequence[Varied], made_of: str) -> Record:
    """The record of the sweep in `folder`, or a new one.

    Raises:
        ConfigError: the folder has a sweep of something else.
    """
    try:
        loaded = json.loads((folder / NAME).read_text(encoding="utf-8"))
        known = [Varied(**{**each, "choices": tuple(each["choices"])}) for each in loaded["varied"]]
        trials = [Trial(**each) for each in loaded["trials"]]
        before = loaded["made_of"]
    except FileNotFoundError:
        return Record(list(varied), made_of)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder / NAME}: can't be read: {error}", "Choose another --output-dir.") from None
    if known != list(varied) or before != made_of:
        what = "other values are varied" if known != list(varied) else "the chats or other options were not the same"
        raise ConfigError(
            f"{folder}: has a sweep already, in which {what}",
            "Give the same chats and options to go on with it, or another --output-dir.",
        )
    return Record(known, made_of, trials)
