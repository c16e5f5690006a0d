"""Ids of tool calls, where a template asks for some."""

from __future__ import annotations

import pytest

from kolotune.chats import Chat, Message
from kolotune.chats.templates.call_ids import CallIds, call_ids_of, with_accepted_ids
from kolotune.chats.templates.template import ChatTemplate

REFUSE = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if CONDITION %}{{ raise_exception('no') }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("condition", "ids"),
    [
        ("c.id is defined and c.id | length != 9", CallIds.ANY),
        ("c.id is not defined or c.id | length != 9", CallIds.SHORT),
        ("c.id is not defined", CallIds.GIVEN),
        ("true", CallIds.ANY),
        ("false", CallIds.ANY),
    ],
)
def test_what_a_template_asks_for(condition: str, ids: CallIds) -> None:
    assert call_ids_of(ChatTemplate(REFUSE.replace("CONDITION", condition), {})) is ids


def call(name: str, call_id: str | None) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": {}}} | ({"id": call_id} if call_id else {})


def chat(ids: tuple[str | None, str | None], results: list[Message]) -> Chat:
    calls = Message("assistant", "", tool_calls=(call("f", ids[0]), call("g", ids[1])))
    return Chat((Message("user", "q"), calls, *results, Message("assistant", "a")))


def result_ids(changed: Chat) -> list[str | None]:
    return [message.tool_call_id for message in changed.messages if message.role == "tool"]


@pytest.mark.parametrize(
    ("ids", "results", "expected"),
    [
        (("call_1", "call_2"), [("call_2", None), ("call_1", None)], ["call00002", "call00001"]),
        ((None, None), [(None, None), (None, None)], ["call00001", "call00002"]),
        ((None, None), [(None, "g"), (None, "f")], ["call00002", "call00001"]),
        ((None, None), [(None, "f"), (None, "g"), (None, "h")], ["call00001", "call00002", None]),
        (("abcdefghi", None), [("abcdefghi", None), (None, None)], ["call00001", "call00002"]),
    ],
)
def test_calls_and_results_get_the_same_ids(
    ids: tuple[str | None, str | None], results: list[tuple[str | None, str | None]], expected: list[str | None]
) -> None:
    tool_turns = [Message("tool", "r", name=name, tool_call_id=call_id) for call_id, name in results]
    changed = with_accepted_ids(chat(ids, tool_turns), CallIds.SHORT)
    assert [each["id"] for each in changed.messages[1].tool_calls] == ["call00001", "call00002"]
    assert result_ids(changed) == expected
    assert with_accepted_ids(changed, CallIds.SHORT) == changed or None in expected


def test_ids_that_are_taken_stay() -> None:
    tool_turns = [Message("tool", "r", tool_call_id=each) for each in ("call_1", "call_2")]
    for ids in (CallIds.ANY, CallIds.GIVEN):
        sample = chat(("call_1", "call_2"), tool_turns)
        assert with_accepted_ids(sample, ids) is sample
    second = [Message("tool", "r", tool_call_id=each) for each in ("abcdefghi", "123456789")]
    sample = chat(("abcdefghi", "123456789"), second)
    assert with_accepted_ids(sample, CallIds.SHORT) is sample
    nothing = Chat((Message("user", "q"), Message("assistant", "a")))
    assert with_accepted_ids(nothing, CallIds.SHORT) is nothing
