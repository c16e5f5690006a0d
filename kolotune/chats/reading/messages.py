"""Turn the turns of a record, whatever names they use, into `Message` objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kolotune.foundation.typed_storage import JsonObject

from ..chat import ROLES, Message
from .content_parts import Content, plain_text, read_content
from .faults import Fault, FaultKind, RecordError, fail
from .json_values import is_filled, kind_of
from .loss_flags import ALL_ANSWERS, AnswerWeights
from .printable import quoted
from .reading_options import DEFAULT, ReadingOptions
from .record_keys import (
    CALL_KEYS,
    COMPANIONS,
    CONTENT_KEYS,
    LOSS_KEYS,
    PAIRS,
    ROLE_KEYS,
    TURN_KEYS,
    RecordPart,
    canonical,
)
from .roles import CALL_ROLES, CHANNELS, ROLE_NAMES, THOUGHT_CHANNEL, THOUGHT_ROLES, role_of
from .thoughts import add_thoughts, different
from .tool_calls import calls_of_text, read_calls
from .tool_definitions import read_tools

_REASONING_KEYS = COMPANIONS[RecordPart.REASONING]
_OTHER_ROLES = ("human", "gpt", "function_call", "observation")
_TOOLS_KEYS = COMPANIONS[RecordPart.TOOLS]
_NAMED_ROLES = {**ROLE_NAMES, "input": "user", "output": "assistant", "question": "user", "answer": "assistant"}
_OTHER_NAMES = {"output_with_loss": "loss"}  # of xtuner
_TYPES_OF_TURNS = ("human", "ai", "system", "tool", "function")


@dataclass
class Turns:
    """The turns of a record.

    Attributes:
        messages: The messages, complete only if there is no fault.
        numbers: The number of the turn that each message comes from.
        faults: What is wrong with the turns.
        tools: Tool definitions that stand in a system turn.
        unread: Keys of turns that say something and are not read, with their values.
        thoughts: Of turns that are a thought, until the answer that they belong to.
        channels: The channels of Harmony's turns, by the number of the turn.
    """

    messages: list[Message] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    tools: tuple[JsonObject, ...] = ()
    unread: list[tuple[str, object]] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    channels: dict[int, str] = field(default_factory=dict)

    def weigh(self, weight: float) -> None:
        """Let the loss on each answer count less, by this factor."""
        for index, message in enumerate(self.messages):
            if message.role == "assistant":
                self.messages[index] = dataclasses.replace(message, weight=weight * message.weight)

    def train_on_last(self) -> None:
        """Exclude all answers but the last from the loss."""
        answers = [index for index, message in enumerate(self.messages) if message.role == "assistant"]
        for index in answers[:-1]:
            self.messages[index] = dataclasses.replace(self.messages[index], weight=0.0)

    def insert_system(self, text: str) -> None:
        """Put a system turn first, unless the same one is there; an empty one is replaced."""
        if self.messages and self.messages[0].role == "system" and not self.messages[0].content.strip():
            self.messages[0] = Message("system", text)
        elif not self.messages or self.messages[0] != Message("system", text):
            self.messages.insert(0, Message("system", text))
            self.numbers.insert(0, 0)


def plain_messages(raw: object) -> tuple[Message, ...] | None:
    """Return the messages of turns that are a role and a text and nothing else, as most are; None for others."""
    if type(raw) is not list or not raw:
        return None
    messages = []
    for turn in raw:
        if type(turn) is not dict or len(turn) != 2:
            return None
        if "role" in turn and "content" in turn:
            role, content = turn["role"], turn["content"]
        elif "from" in turn and "value" in turn:
            role, content = turn["from"], turn["value"]
        else:
            return None
        if type(content) is not str or type(role) is not str:
            return None
        if role not in ROLES:
            if role not in ROLE_NAMES or role in CALL_ROLES:
                return None
            role = ROLE_NAMES[role]
        messages.append(Message(role, content))
    return tuple(messages)


def read_turns(raw: object, options: ReadingOptions = DEFAULT, weights: AnswerWeights = ALL_ANSWERS) -> Turns:
    """Read a list of turns with OpenAI's keys (role, content), ShareGPT's (from, value) and many others.

    Args:
        raw: The value that should be the turns.
        options: What the user decides.
        weights: How much the loss on each answer counts.
    """
    if weights == ALL_ANSWERS and (plain := plain_messages(raw)) is not None:
        return Turns(list(plain), list(range(1, len(plain) + 1)))
    turns = Turns()
    if not isinstance(raw, list):
        cause = f"the turns are {kind_of(raw)}; they must be a list of objects"
        turns.faults.append(Fault(FaultKind.NO_MESSAGES, cause))
        return turns
    if not raw:
        turns.faults.append(Fault(FaultKind.NO_MESSAGES, "the list of turns is empty"))
        return turns
    raw = _as_objects(raw)
    for number, turn in enumerate(raw, 1):
        try:
            _add_turn(turns, turn, number, weights, options)
        except RecordError as error:
            turns.faults.append(dataclasses.replace(error.fault, turn=number))
    if turns.thoughts:
        turns.faults.append(Fault(FaultKind.BAD_REASONING, "no answer follows the thought", turn=len(raw)))
    return turns


def plain_turns(pairs: Sequence[tuple[str, object]]) -> list[JsonObject]:
    """Return turns made of (role, content) pairs, to be checked like any other turns."""
    return [{"role": role, "content": content} for role, content in pairs]


def _as_objects(raw: list[object]) -> list[object]:
    """Return turns that are texts, or pairs of a question and an answer, as objects with a role."""
    if len(raw) > 1 and all([isinstance(turn, str) for turn in raw]):
        return list(plain_turns([(("user", "assistant")[at % 2], text) for at, text in enumerate(raw)]))
    turns: list[object] = []
    for turn in raw:
        if isinstance(turn, list) and len(turn) == 2 and all([isinstance(text, str) for text in turn]):
            turns += plain_turns(list(zip(("user", "assistant"), turn, strict=True)))
        elif isinstance(turn, dict) and turn and (named := _named_by_role(turn)):
            turns += named
        elif (
            isinstance(turn, dict)
            and turn.get("type") in _TYPES_OF_TURNS
            and not {*map(canonical, turn)} & {*ROLE_KEYS}
        ):
            turns.append(_with_role(turn))
        else:
            turns.append(turn)
    return turns


def _with_role(turn: Mapping[str, object]) -> dict[str, object]:
    """Return a turn of LangChain's with its type as the role; what it says may be in an object of its own."""
    said = turn.get("data")
    within = said if isinstance(said, Mapping) and "content" in said else {}
    return {
        **{key: value for key, value in turn.items() if key != "data" or not within},
        **within,
        "type": None,
        "role": turn["type"],
    }


def _named_by_role(turn: Mapping[str, object]) -> list[JsonObject]:
    """Return the turns of an object whose keys are roles, or a question and its answer; none of other objects."""
    if "role" in turn or "from" in turn:  # as most have
        return []
    if turns := _pair_in(turn):
        return turns
    roles = [(_NAMED_ROLES.get(canonical(key)), value) for key, value in turn.items()]
    if all([role is not None and isinstance(value, str) for role, value in roles]):
        return plain_turns([(str(role), value) for role, value in roles])
    return []


def _pair_in(turn: Mapping[str, object]) -> list[JsonObject]:
    """Return the turns of a question and its answer in one object, as xtuner has them; other keys are the answer's."""
    said = {_OTHER_NAMES.get(name := canonical(key), name): value for key, value in turn.items()}
    pair = next(((key, answer) for key in PAIRS if key in said for answer in PAIRS[key] if answer in said), None)
    rest = {key: value for key, value in said.items() if key not in (*(pair or ()), "system")}
    if pair is None or not {*ROLE_KEYS, *CONTENT_KEYS}.isdisjoint(rest):
        return []
    system, question, answer = said.get("system") or "", *map(said.get, pair)
    is_text = all([isinstance(text, str) for text in (system, question, answer)])
    if not is_text or any([role_of(key) == "tool" for key in rest]):
        return []
    turns = plain_turns([("system", system), ("user", question)])
    return [*turns[0 if system else 1 :], {**rest, "role": "assistant", "content": answer}]


def _add_turn(turns: Turns, raw: object, number: int, weights: AnswerWeights, options: ReadingOptions) -> None:
    if not isinstance(raw, dict):
        fail(FaultKind.BAD_MESSAGE, f"{kind_of(raw)}; it must be an object with role and content")
    # Parquet gives every turn every key of the column, most of them null: null means absent.
    turn = {canonical(key): value for key, value in raw.items() if value is not None}
    for key in options.ignored:
        if key not in ROLE_KEYS and key not in CONTENT_KEYS:
            turn.pop(key, None)
    if (thought := _thought_of(turn, weights)) is not None:
        turns.thoughts.append(thought)
        turns.unread += _unread(turn, "assistant")
        return
    name = _role_name(turn)
    role = str(role_of(name))
    turns.unread += _unread(turn, role)
    if role == "assistant" and isinstance(channel := turn.get("channel"), str):
        turns.channels[number] = channel
    if role == "system":
        for key in _TOOLS_KEYS:
            turns.tools += tuple([tool for tool in read_tools(turn.get(key)) if tool not in turns.tools])
    is_call = canonical(name) in CALL_ROLES
    content = _content(turn, role, is_call)
    turns.unread += content.unread
    if turns.thoughts:
        if role != "assistant":
            fail(FaultKind.BAD_REASONING, f"the turn before is a thought, and no {role} turn can follow it")
        add_thoughts(before := Content(content.texts), turns.thoughts)
        content.thoughts, turns.thoughts = different([*before.thoughts, *content.thoughts]), []
    for message in _messages(turn, role, content, number, weights):
        previous = turns.messages[-1] if turns.messages else None
        joins = is_call and message.reasoning is None and previous is not None and previous.role == "assistant"
        if joins and previous is not None and previous.weight == message.weight:
            turns.messages[-1] = dataclasses.replace(previous, tool_calls=(*previous.tool_calls, *message.tool_calls))
            continue
        turns.messages.append(message)
        turns.numbers.append(number)


def _thought_of(turn: Mapping[str, object], weights: AnswerWeights) -> str | None:
    """Return the text of a turn that is a thought; None for other turns."""
    name = _first_of(turn, *ROLE_KEYS)
    if not isinstance(name, str):
        return None
    in_channel = turn.get("channel") == THOUGHT_CHANNEL and role_of(name) == "assistant"
    if canonical(name) not in THOUGHT_ROLES and (not in_channel or any([turn.get(key) for key in CALL_KEYS])):
        return None
    text = _first_of(turn, *CONTENT_KEYS)
    if isinstance(text, list):
        text = plain_text(text, "the thought")
    if not isinstance(text, str):
        fail(FaultKind.BAD_REASONING, f"the thought is {kind_of(text)}; it must be a text")
    if weights.turns is not None or any([turn.get(key) not in (None, "") for key in LOSS_KEYS]):
        fail(FaultKind.NOT_SUPPORTED, "a thought in a turn of its own has no weight; put it into the answer's turn")
    return text.strip().removeprefix("<think>").removesuffix("</think>").strip()


def _unread(turn: Mapping[str, object], role: str) -> list[tuple[str, object]]:
    """Return the filled keys of a turn that are not read, with their values."""
    also_read = ("name",) if role == "tool" else _TOOLS_KEYS if role == "system" else ()
    if role == "assistant" and str(turn.get("channel")) in CHANNELS:
        also_read = ("channel",)
    unread = [(key, turn[key]) for key in turn if key not in TURN_KEYS and key not in also_read]
    for keys in (ROLE_KEYS, CONTENT_KEYS):
        given = sorted([key for key in keys if key in turn], key=lambda key: not is_filled(turn[key]))
        unread += [(key, turn[key]) for key in given[1:] if not _is_same(turn[key], turn[given[0]])]
    return [(key, value) for key, value in unread if is_filled(value)]


def _is_same(one: object, other: object) -> bool:
    """Whether two values are equal, or the same text, once in parts: Claude's exports have it twice."""
    return one == other or (_text_of(one) is not None and _text_of(one) == _text_of(other))


def _text_of(value: object) -> str | None:
    """Return a text, or that of parts, without white space; None for what is neither."""
    parts = [{"text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all([isinstance(part, dict) for part in parts]):
        return None
    return "".join("".join([text for part in parts if isinstance(text := part.get("text"), str)]).split())


def _first_of(turn: Mapping[str, object], *keys: str) -> object:
    """Return the first value that says something, or else the first that is there."""
    given = [turn[key] for key in keys if turn.get(key) is not None]
    return next(filter(is_filled, given), given[0] if given else None)


def _role_name(turn: Mapping[str, object]) -> str:
    name = _first_of(turn, *ROLE_KEYS)
    if name is None:
        fail(FaultKind.MISSING_ROLE, f"no role; known: {', '.join(ROLES)}")
    if not isinstance(name, str):
        fail(FaultKind.UNKNOWN_ROLE, f"the role is {kind_of(name)}; known: {', '.join(ROLES)}")
    if role_of(name) is None:
        cause = f"unknown role {quoted(name, 30)}; known: {', '.join(ROLES)}, {', '.join(_OTHER_ROLES)} and others"
        fail(FaultKind.UNKNOWN_ROLE, cause, subject=quoted(name, 30))
    return name


def _content(turn: Mapping[str, object], role: str, is_call: bool) -> Content:
    """Return what a turn contains: its texts, thoughts, calls and results."""
    raw = _first_of(turn, *CONTENT_KEYS)
    calls = _tool_calls(turn, role)
    if is_call and not calls:
        return Content(thoughts=_reasoning(turn, role), calls=list(calls_of_text(raw)))
    content = read_content(raw, role)
    if content is None and not (role == "assistant" and calls):
        fail(FaultKind.MISSING_CONTENT, f"the {role}'s content is missing or null")
    content = content or Content()
    content.calls += calls
    add_thoughts(content, _reasoning(turn, role))
    if content.thoughts and role != "assistant":
        fail(FaultKind.BAD_REASONING, f"a {role} turn has reasoning; only an assistant turn may")
    if content.calls and role != "assistant":
        fail(FaultKind.BAD_TOOL_CALL, f"a {role} turn has tool_calls; only an assistant turn may")
    return content


def _messages(
    turn: Mapping[str, object], role: str, content: Content, number: int, weights: AnswerWeights
) -> list[Message]:
    """Return the messages of a turn: results of tools in it are messages of their own."""
    results = [Message("tool", text, name=name, tool_call_id=call) for call, name, text in content.results]
    if results and not content.texts and not content.calls:
        return results
    if role == "tool":
        name, call = _text_or_none(turn, "name"), _text_or_none(turn, "tool_call_id")
        return [*results, Message(role, "".join(content.texts), name=name, tool_call_id=call)]
    if role != "assistant":
        return [*results, Message(role, "".join(content.texts))]
    return [
        *results,
        Message(
            role,
            "".join(content.texts),
            reasoning="\n\n".join(content.thoughts) or None,
            tool_calls=tuple(content.calls),
            weight=weights.of(number, turn),
        ),
    ]


def _reasoning(turn: Mapping[str, object], role: str) -> list[str]:
    thoughts = []
    for key in _REASONING_KEYS:
        value = turn.get(key)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            fail(FaultKind.BAD_REASONING, f"the reasoning is {kind_of(value)}; it must be a text")
        if role != "assistant":
            fail(FaultKind.BAD_REASONING, f"a {role} turn has reasoning; only an assistant turn may")
        thoughts.append(value)
    return different(thoughts)  # some tools write one thought under two keys


def _text_or_none(turn: Mapping[str, object], key: str) -> str | None:
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        fail(FaultKind.BAD_TOOL_TURN, f"{key} is {kind_of(value)}; it must be a text")
    return value


def _tool_calls(turn: Mapping[str, object], role: str) -> tuple[JsonObject, ...]:
    calls = _first_of(turn, "tool_calls", "toolcalls")
    legacy = _first_of(turn, "function_call", "functioncall")
    if legacy is not None:
        # OpenAI's format before tool_calls; without this the answer would lose its call.
        older = [{"function": legacy}] if isinstance(legacy, dict) else [legacy]
        if calls and [call["function"] for call in read_calls(calls)] != [
            call["function"] for call in read_calls(older)
        ]:
            fail(FaultKind.BAD_TOOL_CALL, "tool_calls and function_call are not the same; remove one")
        calls = calls or older
    if calls is None or calls == [] or calls == "":
        return ()
    if role != "assistant":
        fail(FaultKind.BAD_TOOL_CALL, f"a {role} turn has tool_calls; only an assistant turn may")
    return read_calls(calls)
