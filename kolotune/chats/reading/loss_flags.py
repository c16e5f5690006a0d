"""Weights and flags of turns and records: what its author says about training on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .faults import Fault, FaultKind, RecordError
from .printable import printable, quoted
from .record_keys import LOSS_KEYS, WEIGHT_KEYS
from .roles import role_of

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class RecordFlags:
    """What a record says about its turns.

    Attributes:
        weight: How much the loss on its answers counts, from 0 to 1.
        turns: The same for each turn, and the key that says so; None where only turns say it.
        is_flagged: Whether the record says something about all of its answers.
    """

    weight: float = 1.0
    turns: tuple[str, tuple[float, ...]] | None = None
    is_flagged: bool = False


@dataclass(frozen=True)
class AnswerWeights:
    """How much the loss on each answer of a record counts.

    Attributes:
        turns: What the record says about each of its turns; None where only turns say it.
        unflagged: How much an answer counts about which nothing is said.
    """

    turns: Sequence[float] | None = None
    unflagged: float = 1.0

    def of(self, number: int, turn: Mapping[str, object]) -> float:
        """Return how much an answer counts: the lowest of what is said.

        Args:
            number: The number of the turn, from 1.
            turn: Its values, by keys in canonical form.

        Raises:
            RecordError: A value is no weight from 0 to 1.
        """
        said = [_weight(key, turn[key]) for key in LOSS_KEYS if turn.get(key) not in (None, "")]
        if self.turns is not None and number <= len(self.turns):
            said.append(self.turns[number - 1])
        return min(said, default=self.unflagged)


ALL_ANSWERS = AnswerWeights()


def record_flags(fields: Mapping[str, object]) -> RecordFlags:
    """Return what the filled keys of `LOSS_KEYS` in a record say about its turns.

    Raises:
        RecordError: A value is no weight from 0 to 1, nor a list of such.
    """
    weight = 1.0
    turns: tuple[str, tuple[float, ...]] | None = None
    is_flagged = False
    for key, value in fields.items():
        is_flagged |= not isinstance(value, list)
        if isinstance(value, list):
            weights = tuple([_weight(key, item) for item in value])
            if turns is not None and len(turns[1]) == len(weights):
                weights = tuple(map(min, weights, turns[1]))
            turns = key, weights
        elif isinstance(value, str) and (role := role_of(value)) is not None:
            if role == "assistant" and not LOSS_KEYS[key]:  # NeMo names the role that is masked
                weight = 0.0
        else:
            weight = min(weight, _weight(key, value))
    return RecordFlags(weight, turns, is_flagged)


def _weight(key: str, value: object) -> float:
    number = _WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
    try:
        weight = float(number) if isinstance(number, bool | int | float | str) else -1.0
    except ValueError:
        weight = -1.0
    is_weight = 0 <= weight <= 1 if key in WEIGHT_KEYS else weight in (0, 1)
    if not is_weight:
        allowed = "a weight lies between 0 and 1" if key in WEIGHT_KEYS else "it is 0 or 1"
        helps = "divide all weights by the largest" if key in WEIGHT_KEYS and weight > 1 else "change it"
        cause = f"{key} is {printable(str(value), 20)}, but {allowed}"
        detail = f"{cause}; {helps}, or read past it with --ignore-keys {printable(key, 20)}"
        raise RecordError(Fault(FaultKind.NOT_SUPPORTED, detail, subject=quoted(key)))
    return weight if LOSS_KEYS[key] else 1 - weight
