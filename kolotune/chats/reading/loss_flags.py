"""Weights and flags of turns and records: what its author says about training on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .faults import Fault, FaultKind, RecordError
from .printable import printable, quoted
from .record_keys import LOSS_KEYS
from .roles import role_of

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class RecordFlags:
    """What a record says about its turns.

    Attributes:
        excludes: The record is not to be trained on.
        turns: For each turn whether it is trained on, and the key that says so; None where only turns say it.
    """

    excludes: bool = False
    turns: tuple[str, tuple[bool, ...]] | None = None


def turn_is_trained(turn: Mapping[str, object]) -> bool:
    """Return whether an answer is trained on, by its keys in canonical form; the most cautious one counts.

    Raises:
        RecordError: A value is neither yes nor no.
    """
    return all([_says_train(key, turn[key]) for key in LOSS_KEYS if turn.get(key) is not None])


def record_flags(fields: Mapping[str, object]) -> RecordFlags:
    """Return what the filled keys of `LOSS_KEYS` in a record say about its turns.

    Raises:
        RecordError: A value is neither yes nor no, nor a list of such.
    """
    excludes = False
    turns: tuple[str, tuple[bool, ...]] | None = None
    for key, value in fields.items():
        if isinstance(value, list):
            trained = tuple([_says_train(key, item) for item in value])
            if turns is not None and len(turns[1]) == len(trained):
                trained = tuple([each and other for each, other in zip(trained, turns[1], strict=True)])
            turns = key, trained
        elif isinstance(value, str) and (role := role_of(value)) is not None:
            excludes |= role == "assistant" and not LOSS_KEYS[key]  # NeMo names the role that is masked
        else:
            excludes |= not _says_train(key, value)
    return RecordFlags(excludes, turns)


def _says_train(key: str, value: object) -> bool:
    number = _WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
    try:
        weight = float(number) if isinstance(number, bool | int | float | str) else -1.0
    except ValueError:
        weight = -1.0
    if weight not in (0, 1):
        shown = printable(str(value), 20)
        cause = f"{key} is {shown}: a turn is trained on (1) or not (0), and nothing in between"
        detail = f"{cause}; round it, or read past it with --ignore-keys {printable(key, 20)}"
        raise RecordError(Fault(FaultKind.NOT_SUPPORTED, detail, subject=quoted(key)))
    return bool(weight) == LOSS_KEYS[key]
