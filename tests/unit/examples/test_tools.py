"""The example with tools: its chats, its questions, its rule and its template."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.example import EXAMPLES, example_script
from support.small_tokenizer import SPECIAL, small_gguf

from kolotune.chats.served_form import tool_as_served
from kolotune.chats.templates.template import ChatTemplate
from kolotune.llamacpp.prompt_server import PromptServer
from kolotune.llamacpp.tokenizer_model import tokenizer_model
from kolotune.ollama.prompt_path import PromptPath, TemplateSources, find_rule

FOLDER = EXAMPLES / "tools"
JUDGE = example_script("tools", "judge")
TEMPLATE = (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
FUNCTIONS = json.loads((FOLDER / "functions.json").read_text(encoding="utf-8"))


@cache
def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def test_the_chats_are_what_the_script_makes() -> None:
    phrases = yaml.safe_load((FOLDER / "phrases.yaml").read_text(encoding="utf-8"))
    assert example_script("tools", "make_chats").make_chats(phrases, FUNCTIONS) == lines("chats.jsonl")


def test_a_good_quarter_of_the_chats_needs_no_call() -> None:
    chats = lines("chats.jsonl")
    without = [chat for chat in chats if all("tool_calls" not in message for message in chat["messages"])]
    assert (len(chats), len(without)) == (243, 93)
    assert sum(len(chat["messages"]) > 4 for chat in chats) > 80, "chats of several exchanges"


def test_every_call_fits_its_function_and_every_value_is_answered() -> None:
    """What is trained follows the rule that judges."""
    for chat in lines("chats.jsonl"):
        for call, result, answer in zip(chat["messages"], chat["messages"][1:], chat["messages"][2:], strict=False):
            if "tool_calls" in call:
                assert_fits(call["tool_calls"][0]["function"])
                values = json.loads(result["content"])
                assert "error" in values or JUDGE.has_values(answer["content"], values), answer


def assert_fits(call: dict[str, Any]) -> None:
    parameters = next(each["function"]["parameters"] for each in FUNCTIONS if each["function"]["name"] == call["name"])
    assert list(call["arguments"]) == parameters["required"] == list(parameters["properties"])
    for name, value in call["arguments"].items():
        assert value in parameters["properties"][name].get("enum", [value])


def test_the_functions_are_in_the_form_that_ollama_hands_on() -> None:
    """So that every server writes what is trained, also one that hands on what a client sends."""
    assert [json.dumps(tool_as_served(function)) for function in FUNCTIONS] == [json.dumps(each) for each in FUNCTIONS]
    assert all(chat["tools"] == FUNCTIONS for chat in lines("chats.jsonl"))


def test_the_questions_are_held_out() -> None:
    chats = json.dumps([chat["messages"] for chat in lines("chats.jsonl")], ensure_ascii=False)
    with_call = [question for question in lines("questions.jsonl") if "function" in question]
    assert len(with_call) == 20 and len(lines("questions.jsonl")) == 30
    for question in lines("questions.jsonl"):
        assert question["question"] not in chats
    for question in with_call:
        assert_fits({"name": question["function"], "arguments": question["arguments"]})
        places = set(question["arguments"].values()) - {"today", "tomorrow"}
        assert not any(place in chats for place in places), places


@pytest.mark.parametrize("tools", [FUNCTIONS, None])
def test_llamacpp_renders_the_template_as_training_does(tmp_path: Path, tools: list[dict[str, Any]] | None) -> None:
    template = ChatTemplate(TEMPLATE, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]})
    system = {"role": "system", "content": 'Be <brief> & "kind".'}
    with PromptServer(tokenizer_model(small_gguf(tmp_path / "small.gguf", TEMPLATE))) as server:
        for chat in lines("chats.jsonl")[:20]:
            ends = [index for index, message in enumerate(chat["messages"]) if message["role"] == "assistant"]
            for first in ([], [system]):
                messages = [*first, *chat["messages"][: ends[-1]]]
                assert server.render(messages, tools) == template.render(messages, tools, True)


def test_ollama_renders_with_the_template_and_accepts_tools() -> None:
    rule = find_rule(TemplateSources("llama", TEMPLATE, "{{ range .Messages }}{{ .Content }}{{ end }}"))
    assert (rule.path, rule.tools) == (PromptPath.JINJA, True)


QUESTION = {"function": "get_tide", "arguments": {"harbour": "Cork", "day": "today"}}


def call(arguments: str, name: str = "get_tide") -> Any:
    return SimpleNamespace(function=SimpleNamespace(name=name, arguments=arguments))


RIGHT = '{"day": "today", "harbour": "Cork"}'


@pytest.mark.parametrize(
    ("calls", "is_right"),
    [
        ([call(RIGHT)], True),
        ([], False),
        ([call(RIGHT), call(RIGHT)], False),
        ([call(RIGHT, "get_weather")], False),
        ([call('{"harbour": "Cork"}')], False),
        ([call('{"harbour": "Cork", "day": "today", "place": "Cork"}')], False),
        ([call('{"harbour": "Corks", "day": "today"}')], False),
        ([call('{"harbour": "Cork", "day"')], False),
    ],
)
def test_which_calls_are_right(calls: list[Any], is_right: bool) -> None:
    assert JUDGE.is_right_call(calls, QUESTION) == is_right


@pytest.mark.parametrize(
    ("answer", "has_values"),
    [
        ("High at 06:42, pier 3, fog.", True),
        ("Fog! At 06:42 from pier 3.", True),
        ("High at 06:42, pier 13, fog.", False),
        ("High at 16:42, pier 3, fog.", False),
        ("High at 06:42, pier -3, fog.", False),
        ("High at 06:42, pier 3.5, fog.", False),
        ("High at 06:42, pier 3, foggy.", False),
        ("High at 06:42:30, pier 3, fog.", False),
    ],
)
def test_which_answers_have_the_values(answer: str, has_values: bool) -> None:
    assert JUDGE.has_values(answer, {"time": "06:42", "pier": 3, "sky": "fog"}) == has_values


def test_a_negative_number_keeps_its_sign() -> None:
    assert JUDGE.has_values("It is -3 degrees.", {"temperature": -3})
    assert not JUDGE.has_values("It is 3 degrees.", {"temperature": -3})


@pytest.mark.parametrize(
    ("content", "calls", "is_in_words"),
    [
        ("Hello!", None, True),
        (" ", None, False),
        (None, None, False),
        ("Hello!", [call(RIGHT)], False),
        ('<tool_call>\n{"name": "get_tide"', None, False),
    ],
)
def test_what_words_are(content: str | None, calls: list[Any] | None, is_in_words: bool) -> None:
    assert JUDGE.is_in_words(SimpleNamespace(content=content, tool_calls=calls)) == is_in_words
