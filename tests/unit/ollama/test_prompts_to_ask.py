"""The prompts that a server is asked for, with training's texts."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.observed import GGUF_TEMPLATES
from support.small_tokenizer import CHATML

from kolotune.chats.templates.template_binding import bind
from kolotune.ollama.modelfile import ModelDescription
from kolotune.ollama.prompts_to_ask import PromptToAsk, as_request, prompts_to_ask
from kolotune.ollama.template_capabilities import Capability

ALTERNATING = GGUF_TEMPLATES["alternates"]
TOOLS = GGUF_TEMPLATES["tools round"]
DESCRIPTION = ModelDescription("./x")
Make = Callable[..., list[PromptToAsk]]


@pytest.fixture
def prompts(tmp_path: Path) -> Make:
    """Return a function that makes prompts for a template: ``prompts(jinja, description, own=…, longest=…)``."""

    def make(
        jinja: str,
        description: ModelDescription = DESCRIPTION,
        *,
        own: list[dict[str, Any]] | None = None,
        longest: int = 4096,
        tools: bool = False,
        thinks: bool = False,
    ) -> list[PromptToAsk]:
        (tmp_path / "chat_template.jinja").write_text(jinja, encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}', encoding="utf-8")
        held_out = tmp_path / "held_out.jsonl"
        if own is not None:
            held_out.write_text("".join(json.dumps(chat) + "\n" for chat in own), encoding="utf-8")
        named = {Capability.TOOLS: tools, Capability.THINKING: thinks}
        return prompts_to_ask(tmp_path, held_out, description, longest, [kind for kind, has in named.items() if has])

    return make


def test_plain_chats(prompts: Make) -> None:
    made = prompts("{{ bos_token }}" + CHATML)
    assert len(made) == 12 and len({prompt.text for prompt in made}) == 12
    assert {prompt.roles.partition(",")[0] for prompt in made} == {"system", "user"}
    for prompt in made:
        assert prompt.bos == "<s>" and prompt.text.startswith("<|im_start|>")
        assert prompt.text.endswith("<|im_start|>assistant\n") and not prompt.tools


def test_what_the_template_or_the_server_does_not_take_is_left_out(prompts: Make) -> None:
    made = prompts(ALTERNATING)
    assert len(made) == 12 and all(prompt.roles.startswith("user") for prompt in made)
    assert not prompts(ALTERNATING, ModelDescription("./x", system="S"))
    short = prompts(CHATML, longest=200)
    assert 0 < len(short) < 12 and all(len(prompt.text.encode()) < 200 for prompt in short)


def test_what_the_modelfile_says_comes_first(prompts: Make) -> None:
    description = ModelDescription("./x", system="S", messages=(("user", "a"), ("assistant", "b")))
    for prompt in prompts(CHATML, description):
        begin = "" if prompt.roles.startswith("system") else "<|im_start|>system\nS<|im_end|>\n"
        assert prompt.text.startswith(begin + "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n")
        assert prompt.messages[0]["content"] not in ("S", "a")


def test_tools(prompts: Make) -> None:
    question, answered = prompts(TOOLS, tools=True)[-2:]
    assert (question.roles, answered.roles) == ("user", "user, assistant, tool")
    assert '<tool_call>"get_tide" {"place": "Genève", "hour": 2}' in answered.text
    assert len(prompts(TOOLS)) == len(prompts(CHATML + "{# tools #}", tools=True)) == 12


def test_the_runs_own_chats(prompts: Make) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"b": 1}'}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    answer = {"role": "assistant", "content": "x"}
    own = [
        {"messages": [{"role": "user", "content": "mine"}, answer]},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "r", "tool_call_id": "a", "name": "f"},
                answer,
            ],
            "tools": [tool],
        },
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "reasoning_content": "thought"},
                {"role": "user", "content": "r"},
                answer,
            ]
        },
        {"messages": [{"role": "user", "content": "fourth"}, answer]},
        {"messages": [{"role": "user", "content": "fifth"}, answer]},
    ]
    made = prompts(TOOLS, own=own, tools=True)[14:]
    assert [prompt.messages[0]["content"] for prompt in made] == ["mine", "q", "fourth"]
    request = [as_request(message) for message in made[1].messages]
    assert request[1]["tool_calls"] == [{**call, "function": {"name": "f", "arguments": {"b": 1}}}]
    assert request[2] == {"role": "tool", "content": "r", "tool_call_id": "a", "tool_name": "f"}
    assert '{"b": 1}</tool_call>' in made[1].text and '"name": "f"' in made[1].text
    assert [prompt.messages[0]["content"] for prompt in prompts(TOOLS, own=own)[12:]] == ["mine", "fourth"]


def test_both_sides_of_a_switch(prompts: Make) -> None:
    """Ollama sets enable_thinking, on if a request says nothing, where it takes the template for one that thinks."""
    switched = GGUF_TEMPLATES["thinking switch"].replace("is defined and enable_thinking is false", "is false")
    template = bind(switched, datetime.date(2026, 1, 2), {}, ["enable_thinking"])
    on, off = prompts(template, thinks=True)[:2]
    assert (on.think, off.think) == (True, False) and on.messages == off.messages
    assert off.text == on.text + "<think>\n\n</think>\n\n"
    (only,) = {(prompt.think, prompt.text.endswith("</think>\n\n")) for prompt in prompts(template)}
    assert only == (None, True)
    bound = bind(switched, datetime.date(2026, 1, 2), {})
    assert {prompt.think for prompt in prompts(bound, thinks=True)} == {None}
