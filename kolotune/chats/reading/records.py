"""The shapes of a record (messages, conversations, alpaca, prompt and answer), and how each becomes turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..chat import Message
from .faults import Fault, RecordError, order_faults, quoted
from .messages import json_or_value, kind_of, plain_turns, read_tools, read_turns

Record = Mapping[str, Any]

ANSWER_KEYS = {"prompt": ("completion", "response"), "question": ("answer",)}
_ALPACA_KEYS = ("instruction", "input", "output", "history")
_PAIR_KEYS = ("prompt", "completion", "response", "question", "answer")
KNOWN_COLUMNS = frozenset(("messages", "conversations", "tools", "system", *_ALPACA_KEYS, *_PAIR_KEYS))
"""The keys of a record that are read; a table's other columns need not be."""

_KNOWN = "messages, conversations, instruction+output, prompt+completion, prompt+response, question+answer"


@dataclass(frozen=True)
class Reading:
    """What a record is.

    Attributes:
        shape: the recognised shape, or "" when there is none.
        messages: the turns; whole only when there are no faults.
        tools: the tool definitions.
        faults: everything that is wrong with it.
    """

    shape: str
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    faults: tuple[Fault, ...] = ()


def read_record(record: Any) -> Reading:
    """Recognises a record's shape and reads its chat.

    Args:
        record: one element of a file of chats, as parsed.

    Returns:
        The chat, or the faults that keep it from being one.
    """
    if not isinstance(record, dict):
        return Reading("", faults=(Fault("not-an-object", f"the record is {kind_of(record)}, no object"),))
    shape = recognise(record)
    if not shape:
        return Reading("", faults=(unknown_shape(list(record)),))
    try:
        turns = _TURNS[shape](record)
        tools = read_tools(record.get("tools"))
        system = _system_text(record)
    except RecordError as error:
        return Reading(shape, faults=(error.fault,))
    messages, faults = read_turns(turns, first=1)
    if system:
        messages.insert(0, Message("system", system))
    # Who follows whom can only be told when every turn was read.
    faults = faults or order_faults(messages, first=0 if system else 1)
    return Reading(shape, tuple(messages), tools, tuple(faults))


def recognise(record: Record) -> str:
    """The name of a record's shape, or "" if its keys fit none.

    Empty texts and nulls count as absent at first, since a table gives every record every key.
    """
    filled = {key for key, value in record.items() if value is not None and value != ""}
    return _shape_of(filled) or _shape_of(set(record))


def unknown_shape(keys: list[str]) -> Fault:
    """The fault of a record, or of a table's columns, that fit no shape."""
    shown = ", ".join(quoted(str(key), 20) for key in keys[:8]) + (", …" if len(keys) > 8 else "")
    return Fault("unknown-shape", f"no shape recognised in the keys {shown or '(none)'}; known: {_KNOWN}")


def _shape_of(keys: set[str]) -> str:
    for name in ("messages", "conversations"):
        if name in keys:
            return name
    if {"instruction", "output"} <= keys:
        return "alpaca"
    for question, answers in ANSWER_KEYS.items():
        for answer in answers:
            if {question, answer} <= keys:
                return f"{question}/{answer}"
    return ""


def _system_text(record: Record) -> str:
    system = record.get("system")
    if system is None:
        return ""
    if not isinstance(system, str):
        raise RecordError("bad-content", f"system is {kind_of(system)}; it must be a text")
    return system if system.strip() else ""


def _listed_turns(record: Record, key: str) -> Any:
    try:
        return json_or_value(record[key])
    except RecordError as error:
        raise RecordError(error.fault.kind, f"in {key}: {error.fault.message}") from None


def _messages(record: Record) -> Any:
    return _listed_turns(record, "messages")


def _conversations(record: Record) -> Any:
    return _listed_turns(record, "conversations")


def _alpaca(record: Record) -> list[dict[str, Any]]:
    asked = [record["instruction"], record.get("input")]
    for name, value in zip(("instruction", "input"), asked, strict=True):
        if value is not None and not isinstance(value, str):
            raise RecordError("bad-content", f"{name} is {kind_of(value)}; it must be a text")
    question = "\n\n".join(text for text in asked if text and text.strip())
    return [*_history(record), *plain_turns([("user", question), ("assistant", record["output"])])]


def _history(record: Record) -> list[dict[str, Any]]:
    try:
        history = json_or_value(record.get("history"))
    except RecordError as error:
        raise RecordError("bad-history", f"history: {error.fault.message}") from None
    if history is None or history == "":
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RecordError("bad-history", "history must be a list of [question, answer] pairs")
    return plain_turns([turn for asked, answered in history for turn in (("user", asked), ("assistant", answered))])


def _asked_and_answered(question_key: str, answer_key: str) -> Callable[[Record], list[Any]]:
    """Either side is a text, or a list of turns as TRL has it. All answers in it are trained on."""

    def turns(record: Record) -> list[Any]:
        question, answer = record[question_key], record[answer_key]
        asked = question if isinstance(question, list) else plain_turns([("user", question)])
        answered = answer if isinstance(answer, list) else plain_turns([("assistant", answer)])
        return [*asked, *answered]

    return turns


_TURNS: dict[str, Callable[[Record], Any]] = {
    "messages": _messages,
    "conversations": _conversations,
    "alpaca": _alpaca,
    **{
        f"{question}/{answer}": _asked_and_answered(question, answer)
        for question, answers in ANSWER_KEYS.items()
        for answer in answers
    },
}
