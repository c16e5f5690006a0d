"""Shapes of a record (messages, conversations, alpaca, prompt/completion, …), and how each becomes a chat."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kolotune.foundation.typed_storage import JsonObject

from ..chat import Message
from .content_parts import plain_text
from .faults import Fault, FaultKind, RecordError, fail
from .json_values import is_filled, json_or_value, kind_of
from .loss_flags import AnswerWeights, RecordFlags, record_flags
from .messages import Turns, plain_messages, read_turns
from .numbered_turns import are_numbered, numbered_turns
from .printable import quoted
from .questions import answer_turns, question_and_answer
from .reading_options import DEFAULT, ReadingOptions
from .record_fields import RecordFields, keys_beside_turns, not_said, unread_hash
from .record_keys import LOSS_KEYS, MEDIA, METADATA, PAIRS, ROLE_KEYS, TURN_LISTS, RecordPart, canonical
from .roles import ROLE_NAMES
from .tool_calls import separate_calls, writes_call
from .tool_definitions import read_tools
from .transcripts import turns_of_text
from .turn_fixes import TurnFix, fix_order
from .turn_order import is_orderly, order_faults
from .turns_as_text import first_role, turns_as_text

_TEXT = "text"
_SYSTEM_MARK = "SYSTEM: "  # of Glaive
_JSON = re.compile(r"\s*(?:\{|\[\s*[\[\]{\"'])")  # and not [INST]
_ANSWERS_BESIDE = PAIRS["prompt"]  # of turns that end with a question
_NOT_OF_TEXTS = ("turns", "contents", "items")  # such texts may all be the user's, as in MT-Bench, or no turns at all
TURN_PREFIX = "turns: "
"""Before the names of unread keys of turns."""
_KNOWN = "messages, conversations, instruction+output, prompt+completion, prompt+response, question+answer and others"
_NO_CHATS = (
    (
        frozenset({"chosen", "rejected"}),
        "preferences: --objective dpo trains on such pairs; --map messages=chosen, or --map "
        "question=prompt,answer=chosen, trains on what was chosen alone",
    ),
    (
        frozenset({"preferred_output", "non_preferred_output"}),
        "preferences: --objective dpo trains on such pairs",
    ),
    *(
        (frozenset(keys), "two answers to one prompt: --objective dpo trains on such pairs")
        for keys in (("response_0", "response_1"), ("response_a", "response_b"), ("human_ref_a", "human_ref_b"))
    ),
    (frozenset({"mapping"}), "a tree of turns, as ChatGPT exports them: make chats of its branches first"),
    (frozenset({"message_id", "parent_id"}), "one turn of a tree: make chats of its branches first"),
    (
        frozenset({_TEXT}),
        "a text without marks of turns: --objective text trains on it; chats have questions and answers",
    ),
)
"""Keys of records that are no chats, and what to do; the first that are all there count."""


class ShapedRecord(NamedTuple):
    """A record whose shape is recognised, with its chat or its faults.

    Attributes:
        shape: The name of the shape, or "" if no shape fits.
        messages: The turns; complete only if there are no faults.
        tools: The tool definitions.
        faults: Everything that is wrong with the record.
        excluded: The record says that it is not to be trained on.
        unread: The filled keys that are not read; those of turns as "turns: key".
        unread_hash: A hash of their values, but for those that only describe a record; 0 if there are none.
        fixes: How the order of turns was changed.
        rejected: Of a pair, the turns of the chat that is not preferred.
        is_desirable: Whether the answer is good, where answers are rated.
    """

    shape: str
    messages: tuple[Message, ...] = ()
    tools: tuple[JsonObject, ...] = ()
    faults: tuple[Fault, ...] = ()
    excluded: bool = False
    unread: tuple[str, ...] = ()
    unread_hash: int = 0
    fixes: tuple[TurnFix, ...] = ()
    rejected: tuple[Message, ...] = ()
    is_desirable: bool = True


def read_record(record: object, options: ReadingOptions = DEFAULT) -> ShapedRecord:
    """Recognise the shape of a parsed record and read its chat, or the faults that keep it from being one."""
    if type(record) is dict and "messages" in record and not options.parts and options.train_on == "all":
        shaped = _plain_record(record, options)
        if shaped is not None:
            return shaped
    if isinstance(record, list) and record and isinstance(record[0], dict):
        record = {"messages": record}
    if not isinstance(record, dict):
        cause = f"the record is {kind_of(record)}, not an object"
        if isinstance(record, list) and record and isinstance(record[0], list):
            cause = "the record is a list of lists; write one chat a record, without a list around several"
        return ShapedRecord("", faults=(Fault(FaultKind.NOT_AN_OBJECT, cause),))
    fields = RecordFields(record, options)
    shape = _recognise(fields)
    if shape is None and (unwrapped := _unwrapped(record, options)) is not None:
        return read_record(unwrapped, options)
    if shape is None:
        return ShapedRecord("", faults=(unknown_shape(list(record)),))
    try:
        return read_shaped(fields, shape, options)
    except RecordError as error:
        return ShapedRecord(shape.name, faults=(error.fault,))


def _unwrapped(record: Mapping[str, object], options: ReadingOptions) -> dict[str, object] | None:
    """Return a record whose chat is in an object under one of its keys, with the keys of that object beside its own."""
    names = {canonical(name) for name in record}
    if any([known <= names for known, _ in _NO_CHATS]):
        return None
    inner = [
        (name, value)
        for name, value in record.items()
        if isinstance(value, dict) and _recognise(RecordFields(value, options)) is not None
    ]
    if len(inner) != 1:
        return None
    ((name, value),) = inner
    rest = {key: each for key, each in record.items() if key != name}
    outer = {canonical(key): each for key, each in rest.items()}
    twins = [(canonical(key), each) for key, each in value.items() if canonical(key) in outer]
    if any([key not in METADATA and each != outer[key] for key, each in twins]):
        return None
    return {**value, **rest}


def _plain_record(record: dict[str, object], options: ReadingOptions) -> ShapedRecord | None:
    """Return a record of roles and texts in which no other key is read, as most are; None for others."""
    beside = keys_beside_turns(tuple(record), options.ignored)
    if beside is None or (beside.read and any([is_filled(record[name]) for name in beside.read])):
        return None
    messages = plain_messages(record["messages"])
    if messages is None or not is_orderly(messages):
        return None
    filled = [(name, record[name]) for name in beside.unread if is_filled(record[name])]
    if not filled:
        return ShapedRecord("messages", messages)
    unread = not_said(filled, [message.content for message in messages])
    return ShapedRecord("messages", messages, unread=_names(unread), unread_hash=unread_hash(unread))


def columns_fault(columns: Sequence[str], options: ReadingOptions = DEFAULT) -> Fault | None:
    """Return the fault of columns that fit no shape; it is reported once, not for each record."""
    twin = next((name for name, count in Counter(columns).items() if count > 1), None)
    if twin is not None:
        cause = f"two columns are named {quoted(twin)}, so no record was read; rename one"
        return Fault(FaultKind.DUPLICATE_KEY, cause)
    # A column may have texts with turns in them, which only its records show.
    if _recognise(RecordFields(dict.fromkeys(columns), options)) is None and _TEXT not in columns:
        fault = unknown_shape(columns)
        return dataclasses.replace(fault, detail=f"{fault.detail}; no record was read")
    return None


def unknown_shape(keys: Sequence[str]) -> Fault:
    """Return the fault of a record, or of a table's columns, that fit no shape."""
    shown = ", ".join(quoted(str(key), 20) for key in keys[:8]) + (", …" if len(keys) > 8 else "")
    names = {canonical(str(key)) for key in keys}
    advice = next((text for known, text in _NO_CHATS if known <= names), "")
    if not advice and (key := next((name for name in _NOT_OF_TEXTS if name in names), None)):
        advice = f"{key} must be objects with a role; --map messages={key} reads texts as question and answer in turn"
    advice = advice or f"known: {_KNOWN}"
    cause = f"no shape recognised in the keys {shown or '(none)'}; {advice}"
    return Fault(FaultKind.UNKNOWN_SHAPE, cause, subject=shown)


@dataclass(frozen=True)
class RecordShape:
    """The keys that the turns are in: a list of turns, or a question and its answer."""

    turns: str = ""
    question: str = ""
    answer: str = ""

    @property
    def name(self) -> str:
        if self.turns:
            return self.turns
        pair = f"{self.question}/{self.answer}"
        return "alpaca" if pair == "instruction/output" else pair


def _recognise(fields: RecordFields) -> RecordShape | None:
    """Return the shape of a record, or None if its keys fit none.

    Empty values count as absent at first, since a table gives every record every key.
    """
    return _shape_of(fields, fields.filled) or _shape_of(fields, set(fields.values))


def _shape_of(fields: RecordFields, keys: set[str]) -> RecordShape | None:
    turns, questions, answers = map(fields.mapped, (RecordPart.TURNS, RecordPart.QUESTION, RecordPart.ANSWER))
    if turns:
        return RecordShape(turns[0])
    if questions or answers:
        known_answers = [answer for several in PAIRS.values() for answer in several]
        question = next((key for key in questions or PAIRS if key in keys), "")
        answer = next((key for key in answers or known_answers if key in keys and key != question), "")
        return RecordShape(question=question, answer=answer) if question and answer else None
    keys = keys - fields.given
    pair = _pair_of(keys)
    for name in TURN_LISTS:
        if name not in keys or not (name in TURN_LISTS[:2] or _may_be_turns(name, fields.values[name])):
            continue
        if pair is None or _name_their_roles(fields.values[name], fields.values[pair.question]):
            return RecordShape(name)
    if pair is not None:
        return pair
    text = fields.values.get(_TEXT)
    return RecordShape(_TEXT) if isinstance(text, str) and turns_of_text(text) else None


def _pair_of(keys: set[str]) -> RecordShape | None:
    pairs = ((question, answer) for question, answers in PAIRS.items() if question in keys for answer in answers)
    return next((RecordShape(question=pair[0], answer=pair[1]) for pair in pairs if pair[1] in keys), None)


def _name_their_roles(value: object, question: object) -> bool:
    """Whether turns beside a question and its answer say who speaks, or begin with that question.

    Else they may be anything that the question is about: a list of things, rows of a table, a dialogue.
    """
    if isinstance(value, str) and not value.lstrip().startswith(("[{", "{")):
        turns: object = turns_of_text(value)
        first = turns[0] if isinstance(turns, list) and turns else None
        return isinstance(first, dict) and first["content"] == question
    if not isinstance(value, list) or not value:
        return True
    if isinstance(value[0], dict):
        names = {canonical(str(name)) for turn in value if isinstance(turn, dict) for name in turn}
        return not names.isdisjoint({*ROLE_KEYS, *ROLE_NAMES, "input", "question", "type"})
    first = value[0][0] if isinstance(value[0], list) and value[0] else value[0]
    return bool(first == question)


def _may_be_turns(key: str, value: object) -> bool:
    """Whether the value of a key that is also used for other things is a list of turns, or a text with turns."""
    if are_numbered(value):
        return True
    if key in _NOT_OF_TEXTS and isinstance(value, list) and any([isinstance(turn, str) for turn in value]):
        return False
    if isinstance(value, str):
        return value.lstrip().startswith("[{") or turns_of_text(value) is not None
    return value is None or (isinstance(value, list) and all([isinstance(turn, dict | str | list) for turn in value]))


def read_shaped(fields: RecordFields, shape: RecordShape, options: ReadingOptions) -> ShapedRecord:
    """Read the chat of a record whose shape is known.

    Raises:
        RecordError: A value is not what its key should have.
    """
    for key in sorted(fields.filled & MEDIA):
        cause = f"{key} is filled; only text can be trained on"
        fail(FaultKind.UNSUPPORTED_CONTENT, f"{cause}, or the text alone with --ignore-keys {key}", subject=key)
    if shape.turns:
        raw: object = _with_answer(fields, _turn_list(shape.turns, fields.read(shape.turns)))
    else:
        raw = question_and_answer(fields, shape.question, shape.answer)
    flags = record_flags({key: fields.read(key) for key in sorted(fields.filled & LOSS_KEYS.keys())})
    if not flags.weight:
        return ShapedRecord(shape.name, excluded=True)
    turns = read_turns(raw, options, _answer_weights(raw, flags, options))
    tools = tuple([tool for _, value in fields.read_all(RecordPart.TOOLS) for tool in read_tools(value)])
    tools += tuple([tool for tool in turns.tools if tool not in tools])
    system = "\n\n".join(plain_text(value, key) for key, value in fields.read_all(RecordPart.SYSTEM))
    if shape.turns:
        system = system.removeprefix(_SYSTEM_MARK)
    if system.strip():
        turns.insert_system(system)
    fixes: tuple[TurnFix, ...] = ()
    if not turns.faults:
        tools = _with_calls_of_texts(turns, tools)
        # The order can only be checked once every turn was read.
        turns.faults += order_faults(turns.messages, turns.numbers)
        if turns.faults and options.fixes_turns:
            fixes = fix_order(turns)
            turns.faults = order_faults(turns.messages, turns.numbers)
    if options.train_on == "last":
        turns.train_on_last()
    if flags.weight < 1:
        turns.weigh(flags.weight)
    answers = [message for message in turns.messages if message.role == "assistant"]
    if not turns.faults and not any([message.is_trained for message in answers]):
        return ShapedRecord(shape.name, excluded=True)
    unread = fields.unread(message.content for message in turns.messages)
    unread += [(f"{TURN_PREFIX}{key}", value) for key, value in turns.unread]
    faults, names = tuple(turns.faults), _names(unread)
    return ShapedRecord(shape.name, tuple(turns.messages), tools, faults, False, names, unread_hash(unread), fixes)


def _names(unread: list[tuple[str, object]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([name for name, _ in unread]))


def _turn_list(key: str, value: object) -> object:
    """Return the turns in a list, which may be JSON text, or in a text with marks."""
    if isinstance(value, Mapping) and are_numbered(value):
        return numbered_turns(value)
    if isinstance(value, str) and not _JSON.match(value) and (turns := turns_of_text(value)):
        return turns
    if (written := turns_as_text(value)) is not None:
        return written
    try:
        return json_or_value(value)
    except RecordError as error:
        raise error.within(field=f"in {key}") from None


def _with_answer(fields: RecordFields, raw: object) -> object:
    """Return turns that end with a question, with the answer that their record has under a key beside them.

    Not beside choices: it may be the number of one of them.
    """
    keys = [key for key in fields.mapped(RecordPart.ANSWER) or _ANSWERS_BESIDE if key in fields.filled]
    if not keys or fields.companions(RecordPart.CHOICES) or not isinstance(raw, list) or first_role(raw[-1:]) != "user":
        return raw
    return [*raw, *answer_turns(keys[0], fields.read(keys[0]))]


def _answer_weights(raw: object, flags: RecordFlags, options: ReadingOptions) -> AnswerWeights:
    """Return how much the loss on each answer counts. A list in the record must have an entry for each turn."""
    unflagged = 0.0 if options.train_on == "flagged" and not flags.is_flagged else 1.0
    if flags.turns is None or not isinstance(raw, list):
        return AnswerWeights(unflagged=unflagged)
    key, weights = flags.turns
    if len(weights) != len(raw):
        cause = f"{key} has {len(weights)} entries for {len(raw)} turns"
        fail(FaultKind.NOT_SUPPORTED, f"{cause}; give each turn one, or read past it with --ignore-keys {key}")
    return AnswerWeights(weights, unflagged)


def _with_calls_of_texts(turns: Turns, tools: tuple[JsonObject, ...]) -> tuple[JsonObject, ...]:
    """Bring calls that are written as text into the form of the tools beside them, and return the tools.

    If the system turn has the definitions as text, calls are text too, and the tools say nothing more.
    """
    if not tools or any(message.tool_calls for message in turns.messages):
        return tools
    if not any(message.role == "assistant" and writes_call(message.content) for message in turns.messages):
        return tools
    if turns.messages[0].role == "system" and "<tools>" in turns.messages[0].content:
        return ()
    for index, message in enumerate(turns.messages):
        separated = separate_calls(message.content) if message.role == "assistant" else None
        if separated is not None and separated[1]:
            content, calls = separated
            turns.messages[index] = dataclasses.replace(message, content=content, tool_calls=calls)
    return tools
