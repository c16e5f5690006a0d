"""What the user decides about the reading of chats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kolotune.foundation.objectives import OBJECTIVES, LearnsFrom

from .record_keys import RecordPart, canonical

if TYPE_CHECKING:
    from kolotune.foundation.config import Config


@dataclass(frozen=True)
class ReadingOptions:
    """What the user decides about the reading of chats.

    Attributes:
        parts: Keys in canonical form, and the part of a chat that each has.
        ignored: Keys in canonical form that are not read, in records and in turns, and not reported.
        fixes_turns: Whether the order of turns is changed where that makes a chat of a record.
        splits_thoughts: Whether each exchange becomes a chat where the template leaves out earlier thoughts.
        train_on: Which answers count in the loss: "all" whose author does not exclude them, of these the chat's "last",
            or those that are "flagged" as counting.
        learns_from: What a record is.
    """

    parts: tuple[tuple[str, RecordPart], ...] = ()
    ignored: tuple[str, ...] = ()
    fixes_turns: bool = False
    splits_thoughts: bool = False
    train_on: Literal["all", "last", "flagged"] = "all"
    learns_from: LearnsFrom = LearnsFrom.CHATS

    @classmethod
    def of(cls, config: Config) -> ReadingOptions:
        """Return what a config says."""
        pairs = [entry.split("=", 1) for entry in config.map]
        return cls(
            tuple((canonical(key), RecordPart(canonical(part))) for part, key in pairs),
            tuple(map(canonical, config.ignore_keys)),
            config.fix_turns,
            config.split_thoughts,
            config.train_on,
            OBJECTIVES[config.objective].learns_from,
        )


DEFAULT = ReadingOptions()
