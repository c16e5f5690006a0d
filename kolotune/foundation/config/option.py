"""What an option is: the kind of its value, its group, the verbs that take it, and what depends on it.

Flags, YAML files, records and the container all read it from the option's field; `options` declares every option.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

T = TypeVar("T")


class Kind(Enum):
    """The kind of an option's value. It decides how the value is normalised, checked and sent elsewhere."""

    VALUE = "a number, a word or a text"
    CHAT_FILES = "files of chats; the flag may be repeated"
    FILE = "a file"
    FOLDER = "a folder to make"
    ADAPTER = "the folder of an adapter, or of a run that trained one"
    BASE_MODEL = "the name or folder of a base model"
    SECRET_SOURCE = "where a secret is read: a file, or - for standard input"
    DATE = "a date, as YYYY-MM-DD"
    NAMES = "names, separated by commas"
    QUANTIZATIONS = "names of quantizations, separated by commas"
    TEXTS = "texts; the flag may be repeated"
    PARAMETERS = "settings as name=value; the flag may be repeated"

    @property
    def is_repeatable(self) -> bool:
        """Whether the flag may be given several times."""
        return self in (Kind.CHAT_FILES, Kind.TEXTS, Kind.PARAMETERS)


class Group(Enum):
    """Options shown together, with the verbs that take them unless a field says otherwise."""

    DATA = "data", "run launch sweep plan check prepare"
    MODEL = "model", "run launch sweep plan check prepare train"
    TRAINING = "training", "run launch sweep plan train"
    MACHINES = "machines", "run launch sweep plan train"
    EXPORT = "export", "run launch sweep plan prepare modelfile export"
    COMPARISON = "comparison", "run launch sweep compare"

    def __init__(self, title: str, verbs: str) -> None:
        self.title = title
        self.verbs = frozenset(verbs.split())


@dataclass(frozen=True)
class Option:
    """What an option is.

    Attributes:
        help: one sentence for ``--help`` and the commented config.
        group: the group in which it is shown.
        kind: of its value.
        verbs: the verbs that have a flag for it.
        stages: the stages whose fingerprint always includes it.
        is_saved: whether the run folder keeps it. If not, it belongs to one call.
        default: the value if nobody gives one; `engine_registry` has the defaults that differ under an engine.
        is_default_recorded: whether a stage's fingerprint includes the default, too. Not for options that are younger
            than the records of earlier versions.
    """

    help: str
    group: Group
    kind: Kind
    verbs: frozenset[str]
    stages: frozenset[str]
    is_saved: bool
    default: object
    is_default_recorded: bool


def option(
    default: T,
    text: str,
    group: Group,
    *,
    kind: Kind = Kind.VALUE,
    stages: str = "",
    more_verbs: str = "",
    without: str = "",
    is_saved: bool = True,
    is_default_recorded: bool = True,
) -> T:
    """Return a field of `Config`; see `Option`.

    Args:
        default, text, group, kind, is_saved, is_default_recorded: as in `Option`.
        stages: names, separated by spaces.
        more_verbs: verbs that take it beside those of its group.
        without: verbs of its group that do not take it.
    """
    verbs = (group.verbs | set(more_verbs.split())) - set(without.split())
    described = Option(text, group, kind, verbs, frozenset(stages.split()), is_saved, default, is_default_recorded)
    return field(default=default, metadata={"option": described})
