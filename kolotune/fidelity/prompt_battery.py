"""A short chat for each trait of chats, to ask servers for its prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from kolotune.chats import Chat, Message
from kolotune.chats.traits import ChatTrait
from kolotune.foundation.typed_storage import JsonObject

_QUESTION = Message("user", "How is the weather in Oslo?")
_SYSTEM = Message("system", "Be brief.")
_ANSWER = Message("assistant", "Mild, and it rains.")
_THANKS = Message("user", "Thank you. And in Rome?")
_LAST = Message("assistant", "Sunny.")


def _tool(description: str, place: str, **more: object) -> JsonObject:
    parameters = {
        "type": "object",
        "properties": {"place": {"type": "string", "description": place}, **more},
        "required": ["place"],
    }
    return {"type": "function", "function": {"name": "weather", "description": description, "parameters": parameters}}


def _call(identity: str, arguments: Mapping[str, object]) -> JsonObject:
    # Nine letters or digits: some templates accept nothing else.
    return {"id": identity, "type": "function", "function": {"name": "weather", "arguments": dict(arguments)}}


_TOOLS = (_tool("Look up the weather", "The city"),)
_RICH_TOOLS = (
    _tool(
        'Wetter "jetzt" \u2013 für <Ort> & Tag:\n- heute\n- morgen',
        "Größe der Stadt egal; z. B. 東京, 'Zürich'",
        unit={"type": "string", "enum": ["°C", "°F"], "default": "°C"},
        days={"type": "array", "items": {"type": "integer"}, "minItems": 1},
    ),
)
_OSLO, _ROME = _call("call00001", {"place": "Oslo"}), _call("call00002", {"place": "Rome"})
_RICH_CALL = _call(
    "call00003",
    {
        "place": "Zürich \"HB\" <Süd> & '東京'\\",
        "unit": "°C",
        "days": [1, 2],
        "more": {"wind": True, "until": None, "t": 0.5},
    },
)
_CALLING = Message("assistant", "", tool_calls=(_OSLO,))
_RESULT = Message("tool", "9 degrees, rain", name="weather", tool_call_id="call00001")

_BATTERY: dict[ChatTrait, tuple[tuple[Message, ...], tuple[JsonObject, ...]]] = {
    ChatTrait.QUESTION: ((_QUESTION,), ()),
    ChatTrait.SYSTEM: ((_SYSTEM, _QUESTION), ()),
    ChatTrait.EMPTY_SYSTEM: ((Message("system", ""), _QUESTION), ()),
    ChatTrait.TURNS: ((_QUESTION, _ANSWER, _THANKS), ()),
    ChatTrait.TOOLS: ((_QUESTION,), _TOOLS),
    ChatTrait.TOOLS_AND_SYSTEM: ((_SYSTEM, _QUESTION), _TOOLS),
    ChatTrait.RICH_TOOLS: ((_QUESTION,), _RICH_TOOLS),
    ChatTrait.CALL: ((_QUESTION, _CALLING, _RESULT), _TOOLS),
    ChatTrait.PARALLEL_CALLS: (
        (
            _QUESTION,
            Message("assistant", "", tool_calls=(_OSLO, _ROME)),
            _RESULT,
            Message("tool", "25 degrees, sun", name="weather", tool_call_id="call00002"),
        ),
        _TOOLS,
    ),
    ChatTrait.CALL_AND_TEXT: (
        (_QUESTION, Message("assistant", "I look it up.", tool_calls=(_OSLO,)), _RESULT),
        _TOOLS,
    ),
    ChatTrait.CALL_WITHOUT_ARGUMENTS: (
        (
            _QUESTION,
            Message("assistant", "", tool_calls=(_call("call00004", {}),)),
            Message("tool", "9 degrees", name="weather", tool_call_id="call00004"),
        ),
        _TOOLS,
    ),
    ChatTrait.RICH_CALL: (
        (
            _QUESTION,
            Message("assistant", "", tool_calls=(_RICH_CALL,)),
            Message("tool", '{"t": "9 °C",\n "sky": "<grau> & \'trüb\'"}', name="weather", tool_call_id="call00003"),
        ),
        _TOOLS,
    ),
    ChatTrait.TURNS_AFTER_CALL: ((_QUESTION, _CALLING, _RESULT, _ANSWER, _THANKS), _TOOLS),
    ChatTrait.THOUGHTS: (
        (_QUESTION, Message("assistant", "Mild.", reasoning="It is October.\nSo: mild."), _THANKS),
        (),
    ),
    ChatTrait.THOUGHTS_BEFORE_CALL: (
        (_QUESTION, Message("assistant", "", reasoning="I have to look.", tool_calls=(_OSLO,)), _RESULT),
        _TOOLS,
    ),
    ChatTrait.SPACES: (
        (
            Message("user", "  if x:\n\treturn 1\n\n"),
            Message("assistant", "\n    y = 2 \n"),
            Message("user", " and\u00a0now? "),
        ),
        (),
    ),
    ChatTrait.COMBINING_MARKS: (
        (Message("user", "Wie ist das Wetter in Zu\u0308rich, Ha\u0300 No\u0323\u0302i?"),),
        (),
    ),
    ChatTrait.COMPATIBILITY_FORMS: ((Message("user", "Is \ufb01ne weather 25 \u2103, or \uff12\uff15…?"),), ()),
}


def battery(thinks: bool = False) -> dict[ChatTrait, Chat]:
    """Return a chat for each trait: what stands before its last turn, an answer, has the trait.

    Args:
        thinks: the answer has a thought.
    """
    last = dataclasses.replace(_LAST, reasoning="Rome in June.") if thinks else _LAST
    return {trait: Chat((*before, last), tools=tools) for trait, (before, tools) in _BATTERY.items()}
