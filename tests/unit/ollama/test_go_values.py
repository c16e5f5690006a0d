"""The values that Go templates get; what they print is compared with Go's in the tests of the renderer."""

from __future__ import annotations

import pytest

from kolotune.ollama.go_values import GoObject, Request, json_of, print_value, template_values


def test_the_dot() -> None:
    turns = [
        {"role": "system", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "system", "content": "d"},
    ]
    values = template_values(turns, Request(think=False))
    assert (values["System"], values["Think"], values["IsThinkSet"], values["Tools"]) == (
        "a\n\nb\n\nd",
        False,
        True,
        [],
    )
    messages = values["Messages"]
    assert isinstance(messages, list)
    assert [turn.fields["Content"] for turn in messages] == ["a\n\nb", "c", "d"]


@pytest.mark.parametrize("value", [1.5, None, [], [1], GoObject({})])
def test_what_is_not_printed(value: object) -> None:
    with pytest.raises(TypeError):
        print_value(value)


def test_a_message_has_no_known_json() -> None:
    with pytest.raises(TypeError):
        json_of([GoObject({"Role": "user"})])
    assert json_of(GoObject({"b": 1}, {"b": 1}, is_map=True)) == '{"b":1}'
