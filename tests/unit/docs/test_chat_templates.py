"""docs/chat-templates.md has the table that the two renderers make; and no value of a server changes a rendering."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.small_tokenizer import small_gguf
from support.template_table import DATE, PAGE, TOKENS, conversations, measure, sources, table

from kolotune.chats.templates import sandbox
from kolotune.chats.templates.frozen_date import freeze_date
from kolotune.chats.templates.template_binding import bind
from kolotune.llamacpp.prompt_server import PromptServer
from kolotune.llamacpp.tokenizer_model import tokenizer_model

# What servers and clients are known to hand to templates, and a name that no template has.
SERVED = (
    "date_string", "datetime", "current_time", "thinking", "documents", "builtin_tools", "custom_tools", "tools",
    "tools_in_user_message", "model_identity", "reasoning_effort", "keep_past_thinking", "preserve_thinking",
    "preserve_reasoning", "add_vision_id", "pad_token", "mood",
)  # fmt: skip
VALUES = (True, False, None, "", "on", "low", "2026-01-01", 0, 3, 1.5, [], ["a"], [{"name": "a"}], {}, {"a": 1})
NOTHING = (None, [])  # what a server may hand for tools where there are none


@pytest.mark.slow
def test_the_page_has_the_table_of_both_renderers() -> None:
    assert table(measure()) in PAGE.read_text(encoding="utf-8"), "PYTHONPATH=tests python -m support.template_table"


@pytest.mark.parametrize("name", ["meta-llama-Llama-3.1-8B-Instruct", "Qwen-Qwen3-0.6B", "deepseek-ai-DeepSeek-V3.1"])
def test_a_served_template_renders_one_way(name: str, templates_folder: Path, tmp_path: Path) -> None:
    check_for_values_of_servers((templates_folder / f"{name}.jinja").read_text(encoding="utf-8"), tmp_path, name)


@pytest.mark.slow
def test_all_served_templates_render_one_way(tmp_path: Path) -> None:
    for name, source in sources().items():
        check_for_values_of_servers(source, tmp_path, name)


def check_for_values_of_servers(source: str, folder: Path, name: str) -> None:
    """Check that llama.cpp's server writes the same whatever a request gives to the template."""
    chance = random.Random(0)
    variables = [*SERVED, *sandbox.free_variables(freeze_date(source, DATE))]
    free = [each for each in variables if each not in ("messages", "add_generation_prompt", *TOKENS)]
    with PromptServer(tokenizer_model(small_gguf(folder / "small.gguf", bind(source, DATE, TOKENS)))) as server:
        for kind in ("question", "tools and system", "thoughts"):
            conversation = conversations()[kind]
            tools = conversation.chat.tools
            expected = server.render(conversation.sent, tools)
            for _ in range(3):
                values: dict[str, object] = {each: chance.choice(VALUES) for each in free}
                values["enable_thinking"] = chance.choice([True, False])  # the server refuses others
                values["tools"] = list(tools) or chance.choice(NOTHING)
                assert server.render(conversation.sent, tools, **values) == expected, (name, values)
