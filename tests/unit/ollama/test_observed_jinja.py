"""The GGUF's template renders what a real Ollama rendered: by our own renderer, and by llama.cpp's server here."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import llamacpp_messages
from support.observed import CHATS, DATE, OBSERVED, ObservedModel
from support.small_tokenizer import small_gguf

from kolotune.chats.served_form import tool_as_served
from kolotune.foundation.errors import TemplateError
from kolotune.llamacpp.prompt_server import PromptServer
from kolotune.llamacpp.tokenizer_model import tokenizer_model

# One model for each template: what the Modelfile says does not count where the GGUF's template is used.
MODELS = {model.gguf_name: model for model in OBSERVED if model.shows == "gguf"}
UNSUPPORTED = "does not support"  # Ollama's own refusals, which llama.cpp never sees


def think_of(model: ObservedModel, chat: dict[str, Any]) -> bool | None:
    """What Ollama sends: on, where the model can think and a request says nothing."""
    think: bool | None = chat.get("think", True if "thinking" in model.capabilities else None)
    return think


def compare(model: ObservedModel, render: Callable[[dict[str, Any]], str]) -> int:
    """Compare the prompts of a model, and return how many there are."""
    count = 0
    for name, expected in model.prompts.items():
        if isinstance(expected, dict):
            if UNSUPPORTED not in expected["error"]:
                with pytest.raises(TemplateError):
                    render(CHATS[name])
            continue
        count += 1
        assert render(CHATS[name]) == expected, name
    return count


def test_the_modelfile_does_not_count() -> None:
    assert len(MODELS) == 10
    for model in OBSERVED:
        assert model.shows != "gguf" or model.prompts == MODELS[model.gguf_name].prompts


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_our_renderer(model: ObservedModel) -> None:
    jinja = model.jinja.replace("strftime_now('%d %b %Y')", f"'{DATE}'")

    def render(chat: dict[str, Any]) -> str:
        think = think_of(model, chat)
        return llamacpp_messages.render(jinja, chat["messages"], chat.get("tools", ()), think, DATE)

    assert compare(model, render) >= 8


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_llama_cpps_server(model: ObservedModel, tmp_path: Path) -> None:
    with PromptServer(tokenizer_model(small_gguf(tmp_path / "small.gguf", model.jinja))) as server:

        def render(chat: dict[str, Any]) -> str:
            think = think_of(model, chat)
            variables = {} if think is None else {"enable_thinking": think}
            tools = [tool_as_served(tool) for tool in chat.get("tools", ())]
            text = server.render(llamacpp_messages.from_ollama(chat["messages"]), tools, **variables)
            return text.replace(datetime.date.today().strftime("%d %b %Y"), DATE)

        assert compare(model, render) >= 8
