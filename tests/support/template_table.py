"""Compare how Jinja2 and llama.cpp's server render chat templates of published models, bound as training binds them.

    python tests/support/template_table.py

writes the table of docs/chat-templates.md again.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kolotune.chats import Chat, Message
from kolotune.chats.templates.rendering import Rendering
from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.templates.template_binding import bind
from kolotune.chats.traits import ChatTrait
from kolotune.fidelity.prompt_battery import battery
from kolotune.foundation.errors import TemplateError
from kolotune.llamacpp.prompt_server import PromptServer
from kolotune.llamacpp.tokenizer_model import tokenizer_model
from support.small_tokenizer import small_gguf

DATE = datetime.date(2026, 3, 5)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_USER = Message("user", "How is the weather in Oslo?")
_MORE = {
    "late system": (_USER, Message("assistant", "Mild."), Message("system", "Be brief."), _USER),
    "two users": (_USER, Message("user", "And in Rome?")),
}


@dataclass(frozen=True)
class Comparison:
    """What both make of one conversation; None where one refuses it.

    Attributes:
        trained: As training renders it.
        served: As llama.cpp's server does.
        reasons: Of the refusals, training's first.
    """

    trained: str | None
    served: str | None
    reasons: tuple[str, str]


def conversations() -> dict[str, Chat]:
    """Return the conversations by what they have; the last turn of each is the one before the answer."""
    chats = {
        trait.value.replace("-", " "): Chat(chat.messages[:-1], tools=chat.tools)
        for trait, chat in battery().items()
        if trait is not ChatTrait.COMBINING_MARKS  # which says something of tokenizers
    }
    return chats | {name: Chat(messages) for name, messages in _MORE.items()}


def compare(source: str, folder: Path, chats: Mapping[str, Chat]) -> dict[str, Comparison]:
    """Render conversations with a template, bound, in Jinja2 and by llama.cpp's server."""
    template = ChatTemplate(bind(source, DATE, TOKENS), TOKENS)
    gguf = tokenizer_model(small_gguf(folder / "small.gguf", template.jinja))
    with PromptServer(gguf) as server:
        return {name: _compare(chat, template, server) for name, chat in chats.items()}


def _compare(chat: Chat, template: ChatTemplate, server: PromptServer) -> Comparison:
    trained = served = None
    reasons = ["", ""]
    try:
        rendering = Rendering(chat, template)
        trained = rendering.render(rendering.messages, prompt=True)
    except TemplateError as error:
        reasons[0] = error.cause
    try:
        served = server.render(chat.message_dicts(), chat.tools)
    except TemplateError as error:
        reasons[1] = error.cause
    return Comparison(trained, served, (reasons[0], reasons[1]))
