"""Shapes of a record (messages, conversations, alpaca, prompt/completion, …), and how each becomes turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kolotune.foundation.typed_storage import JsonObject

from ..chat import Message
from .faults import Fault, FaultKind, RecordError, fail
from .messages import json_or_value, kind_of, plain_turns, read_tools, read_turns
from .printable import quoted
from .turn_order import order_faults

ANSWER_KEYS = {"prompt": ("completion", "response"), "question": ("answer",)}
_ALPACA_KEYS = ("instruction", "input", "output", "history")
_PAIR_KEYS = ("prompt", "completion", "response", "question", "answer")
KNOWN_COLUMNS = frozenset(("messages", "conversations", "tools", "system", *_ALPACA_KEYS, *_PAIR_KEYS))
"""The keys of a record that are read; other columns of a table are skipped."""

_KNOWN = "messages, conversations, instruction+output, prompt+completion, prompt+response, question+answer"


@dataclass(frozen=True)
class ShapedRecord:
    """A record whose shape is recognised, with its chat or its faults.

    Attributes:
        shape: The name of the shape, or "" if no shape fits.
        messages: The turns; complete only if there are no faults.
        tools: The tool definitions.
        faults: Everything that is wrong with the record.
    """

    shape: str
    messages: tuple[Message, ...] = ()
    tools: tuple[JsonObject, ...] = ()
    faults: tuple[Fault, ...] = ()


def read_record(record: object) -> ShapedRecord:
    """Recognise the shape of a parsed record and read its chat, or the faults that keep it from being one."""
    if not isinstance(record, dict):
        fault = Fault(FaultKind.NOT_AN_OBJECT, f"the record is {kind_of(record)}, not an object")
        return ShapedRecord("", faults=(fault,))
    shape = recognise(record)
    if not shape:
        return ShapedRecord("", faults=(unknown_shape(list(record)),))
    try:
        turns = _READERS[shape](record)
        tools = read_tools(record.get("tools"))
        system = _system_text(record)
    except RecordError as error:
        return ShapedRecord(shape, faults=(error.fault,))
    messages, faults = read_turns(turns, first=1)
    if system:
        messages.insert(0, Message("system", system))
    # The order can only be checked once every turn was read.
    faults = faults or order_faults(messages, first=0 if system else 1)
    return ShapedRecord(shape, tuple(messages), tools, tuple(faults))


def recognise(record: Mapping[str, object]) -> str:
    """Return the name of a record's shape, or "" if its keys fit none.

    Empty texts and nulls count as absent at first, since a table gives every record every key.
    """
    filled = {key for key, value in record.items() if value is not None and value != ""}
    return _shape_of(filled) or _shape_of(set(record))


def unknown_shape(keys: Sequence[str]) -> Fault:
    """Return the fault of a record, or of a table's columns, that fit no shape."""
    shown = ", ".join(quoted(str(key), 20) for key in keys[:8]) + (", …" if len(keys) > 8 else "")
    return Fault(FaultKind.UNKNOWN_SHAPE, f"no shape recognised in the keys {shown or '(none)'}; known: {_KNOWN}")


def columns_fault(columns: Sequence[str]) -> Fault | None:
    """Return the fault of columns that fit no shape; it is reported once, not for each record."""
    twin = next((name for name, count in Counter(columns).items() if count > 1), None)
    if twin is not None:
        return Fault(
            FaultKind.DUPLICATE_KEY, f"two columns are named {quoted(twin)}, so no record was read; rename one"
        )
    if not recognise(dict.fromkeys(columns)):
        fault = unknown_shape(columns)
        return Fault(fault.kind, f"{fault.detail}; no record was read")
    return None


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


def _system_text(record: JsonObject) -> str:
    system = record.get("system")
    if system is None:
        return ""
    if not isinstance(system, str):
        fail(FaultKind.BAD_CONTENT, f"system is {kind_of(system)}; it must be a text")
    return system if system.strip() else ""


def _turn_list(key: str) -> Callable[[JsonObject], object]:
    """Return the reader of a record that has its turns in a list, which may be JSON text."""

    def turns(record: JsonObject) -> object:
        try:
            return json_or_value(record[key])
        except RecordError as error:
            raise error.within(field=f"in {key}") from None

    return turns


def _alpaca(record: JsonObject) -> list[JsonObject]:
    texts = []
    for name in ("instruction", "input"):
        value = record.get(name)
        if isinstance(value, str):
            texts.append(value)
        elif value is not None:
            fail(FaultKind.BAD_CONTENT, f"{name} is {kind_of(value)}; it must be a text")
    question = "\n\n".join(text for text in texts if text.strip())
    return [*_history(record), *plain_turns([("user", question), ("assistant", record["output"])])]


def _history(record: JsonObject) -> list[JsonObject]:
    try:
        history = json_or_value(record.get("history"))
    except RecordError as error:
        raise error.within(FaultKind.BAD_HISTORY, "history") from None
    if history is None or history == "":
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        fail(FaultKind.BAD_HISTORY, "history must be a list of [question, answer] pairs")
    return plain_turns([turn for pair in history for turn in zip(("user", "assistant"), pair, strict=True)])


def _question_and_answer(question_key: str, answer_key: str) -> Callable[[JsonObject], list[object]]:
    """Return the reader of a pair. Each side is a text, or a list of turns as in TRL; all answers are trained on."""

    def turns(record: JsonObject) -> list[object]:
        question, answer = record[question_key], record[answer_key]
        questions = question if isinstance(question, list) else plain_turns([("user", question)])
        answers = answer if isinstance(answer, list) else plain_turns([("assistant", answer)])
        return [*questions, *answers]

    return turns


_READERS: dict[str, Callable[[JsonObject], object]] = {
    "messages": _turn_list("messages"),
    "conversations": _turn_list("conversations"),
    "alpaca": _alpaca,
    **{
        f"{question}/{answer}": _question_and_answer(question, answer)
        for question, answers in ANSWER_KEYS.items()
        for answer in answers
    },
}
