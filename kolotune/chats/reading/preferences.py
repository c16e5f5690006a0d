"""Records of preferences: pairs of a preferred and a rejected answer, and answers that are labelled good or bad.

A pair is read as two chats. What both have in common at the start is the prompt, and only what follows is trained on.
Each is read as any other chat (`shapes`): a question and its answer, or a list of turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from kolotune.foundation.objectives import LearnsFrom

from ..chat import Message
from .faults import Fault, FaultKind, RecordError, fail
from .json_values import is_filled, json_or_value, kind_of
from .judged_answers import judged_answers, judged_columns
from .printable import printable, quoted
from .reading_options import ReadingOptions
from .record_fields import RecordFields
from .record_keys import LABELS, PREFERRED, PROMPTS, REJECTED_BESIDE, TURN_LISTS, RecordPart, canonical
from .shapes import TURN_PREFIX, RecordShape, ShapedRecord, columns_fault, read_record, read_shaped
from .transcripts import turns_of_text
from .turns_as_text import first_role, turns_as_text

_LABEL_WORDS = {
    "true": True, "yes": True, "1": True, "1.0": True, "desirable": True, "chosen": True, "good": True,
    "false": False, "no": False, "0": False, "0.0": False, "undesirable": False, "rejected": False, "bad": False,
}  # fmt: skip
_PAIR_KEYS = "prompt+chosen+rejected, chosen+rejected, input+preferred_output+non_preferred_output"


class _PairKeys(NamedTuple):
    """The keys of the two answers, or of the two whole chats."""

    preferred: str
    rejected: str


def read_preference(record: object, options: ReadingOptions) -> ShapedRecord:
    """Read a pair of answers or, if the objective learns from such, a labelled one; or the faults of the record."""
    if not isinstance(record, dict):
        fault = Fault(FaultKind.NOT_AN_OBJECT, f"the record is {kind_of(record)}, not an object")
        return ShapedRecord("", faults=(fault,))
    try:
        record = judged_answers(record) or _with_turns_before(_with_flat_input(record))
    except RecordError as error:
        return ShapedRecord("", faults=(error.fault,))
    fields = RecordFields(record, options)
    pair = _pair_of(fields) or _pair_of(fields, set(fields.values))
    if pair is not None and _is_labelled_row(fields, pair, options):
        pair = None
    try:
        if pair is not None:
            return _read_pair(record, pair, options)
        label = _label_key(fields) or _label_key(fields, set(fields.values))
        if options.learns_from is LearnsFrom.RATED and label:
            return _read_rated(record, fields, label, options)
    except RecordError as error:
        return ShapedRecord("" if pair is None else "/".join(pair), faults=(error.fault,))
    return ShapedRecord("", faults=(_no_preference(list(record), bool(label), options),))


def preference_columns_fault(columns: Sequence[str], options: ReadingOptions) -> Fault | None:
    """Return the fault of a table's columns in which no record can be a preference."""
    fields = RecordFields(dict.fromkeys(columns), options)
    rated = options.learns_from is LearnsFrom.RATED and _label_key(fields, set(fields.values))
    if judged_columns(columns):
        return None
    if _pair_of(fields, set(fields.values)) is None and not rated:
        fault = _no_preference(columns, bool(_label_key(fields, set(fields.values))), options)
        return dataclasses.replace(fault, detail=f"{fault.detail}; no record was read")
    return columns_fault(columns, options) if rated and _pair_of(fields, set(fields.values)) is None else None


def _with_flat_input(record: dict[str, object]) -> dict[str, object]:
    """Return a record whose OpenAI-style ``input`` (turns and tools in an object) is spread over keys of its own."""
    for name, value in record.items():
        if canonical(name) == "input" and isinstance(value, Mapping) and "messages" in value:
            rest = {key: each for key, each in record.items() if key != name}
            within = {key: each for key, each in value.items() if key != "messages"}
            return {"input": value["messages"], **within, **rest}
    return record


def _with_turns_before(record: dict[str, object]) -> dict[str, object]:
    """Return a record with a rejected answer beside a whole chat (ms-swift) with what is before the last turn apart."""
    names = {canonical(name): name for name in record}
    rejected = record.get(names.get("rejected_response", ""))
    name = next((names[key] for key in TURN_LISTS if key in names and is_filled(record[names[key]])), "")
    if not is_filled(rejected) or not name or not {"prompt", "chosen_response"}.isdisjoint(names):
        return record
    turns = record[name] if isinstance(record[name], list) else turns_as_text(record[name])
    if not isinstance(turns, list) or len(turns) < 2:
        return record
    return {**record, "prompt": turns[:-1], name: turns[-1:]}


def _pair_of(fields: RecordFields, keys: set[str] | None = None) -> _PairKeys | None:
    """Return the keys of a record's pair, of those that are filled; None if there is none."""
    keys = fields.filled if keys is None else keys
    keys = keys - fields.given
    preferred, rejected = fields.mapped(RecordPart.CHOSEN), fields.mapped(RecordPart.REJECTED)
    if preferred or rejected:
        preferred = preferred or [key for key in PREFERRED if key in keys]
        rejected = rejected or [key for key in PREFERRED.values() if key in keys]
        return _PairKeys(preferred[0], rejected[0]) if preferred and rejected else None
    for key, other in PREFERRED.items():
        if key in keys and other in keys:
            return _PairKeys(key, other)
    rejected_key = next((key for key in REJECTED_BESIDE if key in keys), "")
    beside = next((key for key in (*TURN_LISTS, "response", "output", "answer") if key in keys), "")
    return _PairKeys(beside, rejected_key) if rejected_key and beside else None


def _is_labelled_row(fields: RecordFields, pair: _PairKeys, options: ReadingOptions) -> bool:
    """Whether a row of a table that has columns for pairs, too, is a labelled answer."""
    return options.learns_from is LearnsFrom.RATED and fields.filled.isdisjoint(pair) and bool(_label_key(fields))


def _label_key(fields: RecordFields, keys: set[str] | None = None) -> str:
    keys = {key for key, value in fields.values.items() if value is not None} if keys is None else keys
    mapped = fields.mapped(RecordPart.LABEL)
    return mapped[0] if mapped else next((key for key in LABELS if key in keys), "")


def _no_preference(keys: Sequence[str], has_label: bool, options: ReadingOptions) -> Fault:
    shown = ", ".join(quoted(str(key), 20) for key in keys[:8]) + (", …" if len(keys) > 8 else "")
    if options.learns_from is LearnsFrom.RATED:
        what = "neither a label nor a pair of answers"
        advice = f"known: label (true or false) beside a chat, {_PAIR_KEYS}; --map label=KEY names another key"
    else:
        what = "no pair of answers"
        advice = f"known: {_PAIR_KEYS}; --map chosen=KEY,rejected=KEY names other keys"
        if has_label:
            advice = "answers with a label are for --objective kto"
    cause = f"{what} in the keys {shown or '(none)'}; {advice}; --objective sft trains on chats"
    return Fault(FaultKind.NO_PREFERENCE, cause, subject=shown)


def _read_pair(record: dict[str, object], pair: _PairKeys, options: ReadingOptions) -> ShapedRecord:
    sides = [_read_side(record, own, other, options) for own, other in (pair, reversed(pair))]
    faults = tuple(dict.fromkeys(fault for side in sides for fault in side.faults))
    preferred, rejected = sides
    if faults or preferred.excluded or rejected.excluded:
        return preferred._replace(faults=faults, excluded=not faults)
    both = preferred.messages, rejected.messages
    shaped = _of_both_sides(preferred, rejected)
    if both[0] == both[1]:
        return shaped._replace(rejected=rejected.messages)
    start = _common_start(*both, pair)
    messages, others = (_trained_from(start, each) for each in both)
    if not messages or not others:
        return ShapedRecord(shaped.shape, excluded=True)
    return shaped._replace(messages=messages, rejected=others)


def _of_both_sides(preferred: ShapedRecord, rejected: ShapedRecord) -> ShapedRecord:
    """Return the preferred side with what both do not read, or change: keys of turns are those of either."""
    names = dict.fromkeys([*preferred.unread, *rejected.unread])
    unread = tuple([
        name for name in names
        if name.startswith(TURN_PREFIX) or (name in preferred.unread and name in rejected.unread)
    ])  # fmt: skip
    both = (preferred.unread_hash + rejected.unread_hash) % 2**64 if unread else 0
    fixes = tuple(dict.fromkeys([*preferred.fixes, *rejected.fixes]))
    return preferred._replace(unread=unread, unread_hash=both, fixes=fixes)


def _read_side(record: dict[str, object], key: str, other: str, options: ReadingOptions) -> ShapedRecord:
    """Read the chat with one of the two answers; faults name its key."""
    fields = RecordFields(record, options)
    fields.read(other)
    fields.read_only_if_mapped(RecordPart.REASONING)  # beside two answers it is a judge's, or of one of them
    value = fields.values[key] = _as_turns(fields, key)
    for name in TURN_LISTS:
        if name != key and name in fields.filled and fields.values[name] == value:
            fields.read(name)  # UltraFeedback's messages are the preferred chat again
    question = _prompt_key(fields, key)
    shape = RecordShape(turns=key) if _is_whole_chat(value, question) else RecordShape(question=question, answer=key)
    if not shape.turns and not question:
        fail(FaultKind.NO_PREFERENCE, f"{key} has an answer, but there is no prompt; --map question=KEY names its key")
    try:
        shaped = read_shaped(fields, shape, options)
    except RecordError as error:
        raise error.within(field=error.fault.field or key) from None
    faults = tuple([dataclasses.replace(fault, field=fault.field or key) for fault in shaped.faults])
    return shaped._replace(faults=faults, shape=f"{key}/{other}" if shape.turns else f"{question}/{key}/{other}")


def _as_turns(fields: RecordFields, key: str) -> object:
    """Return an answer as it is read: a single turn as a list, turns that are written as text parsed."""
    value = fields.values[key]
    if isinstance(value, str):
        return turns_as_text(value) or _calls_as_text(fields, value) or value
    return [value] if isinstance(value, dict) else value


def _calls_as_text(fields: RecordFields, text: str) -> list[object] | None:
    """Return the calls that a text is, if tools are beside it; else JSON is an answer like any other."""
    if not text.lstrip().startswith("[{") or not fields.companions(RecordPart.TOOLS):
        return None
    try:
        calls = json_or_value(text)
    except RecordError:
        return None
    return (
        calls
        if isinstance(calls, list) and all([isinstance(call, dict) and "name" in call for call in calls])
        else None
    )


def _prompt_key(fields: RecordFields, answer: str) -> str:
    mapped = fields.mapped(RecordPart.QUESTION) or fields.mapped(RecordPart.TURNS)
    return next((key for key in mapped or PROMPTS if key in fields.filled and key != answer), "")


def _is_whole_chat(value: object, question: str) -> bool:
    """Whether the value of an answer's key is a whole chat, its prompt included."""
    if isinstance(value, str):
        return not question and turns_of_text(value) is not None
    return isinstance(value, list) and first_role(value) in ("user", "system")


def _common_start(messages: Sequence[Message], others: Sequence[Message], pair: _PairKeys) -> int:
    """Return how many turns both chats begin with.

    Raises:
        RecordError: What follows is not an answer in each.
    """
    start = 0
    while start < min(len(messages), len(others)) and messages[start] == others[start]:
        start += 1
    if start == min(len(messages), len(others)):
        longer = pair.preferred if len(messages) > len(others) else pair.rejected
        fail(FaultKind.DIFFERENT_PROMPTS, f"{longer} only continues the other chat; both must answer the same prompt")
    if {messages[start].role, others[start].role} != {"assistant"}:
        cause = (
            f"{pair.preferred} and {pair.rejected} differ in a turn that is no answer; both must have the same prompt"
        )
        raise RecordError(Fault(FaultKind.DIFFERENT_PROMPTS, cause, turn=start + 1))
    return start


def _trained_from(start: int, messages: Iterable[Message]) -> tuple[Message, ...]:
    """Return messages of which only those from `start` on are trained on; none if their author excludes them all.

    Raises:
        RecordError: One of them has a weight between 0 and 1.
    """
    trained = tuple([
        dataclasses.replace(message, weight=0.0) if at < start and message.role == "assistant" else message
        for at, message in enumerate(messages)
    ])  # fmt: skip
    if any([0 < message.weight < 1 for message in trained]):
        fail(FaultKind.NOT_SUPPORTED, "preferences can't have weights; read past them with --ignore-keys weight")
    return trained if any([each.role == "assistant" and each.is_trained for each in trained]) else ()


def _read_rated(record: dict[str, object], fields: RecordFields, label: str, options: ReadingOptions) -> ShapedRecord:
    value = fields.values[label]
    rating = _LABEL_WORDS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if rating is None:
        shown = printable(str(value), 20) if str(value or "").strip() else "empty"
        cause = f"{label} is {shown}, but a label is true or false"
        fail(FaultKind.NO_PREFERENCE, cause, subject=quoted(label))
    others = {name: each for name, each in record.items() if canonical(name) != label}
    parts = tuple([(key, part) for key, part in options.parts if part is not RecordPart.LABEL])
    shaped = read_record(others, dataclasses.replace(options, parts=parts, learns_from=LearnsFrom.CHATS))
    if shaped.faults or shaped.excluded:
        return shaped
    users = [at for at, message in enumerate(shaped.messages) if message.role == "user"]
    messages = _trained_from(users[-1] if users else 0, shaped.messages)
    if not messages:
        return ShapedRecord(shaped.shape, excluded=True)
    return shaped._replace(messages=messages, is_desirable=rating)
