"""The prompts that a server is asked for, and the texts that training has for them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.chats.reading.files import opened, read_chat
from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.tokens.tokenizer import template_of
from kolotune.foundation.errors import KolotuneError, TemplateError
from kolotune.foundation.typed_storage import JsonObject

from .modelfile import ModelDescription
from .template_capabilities import Capability
from .template_proof import battery

_OLLAMAS_SWITCH = "enable_thinking"
_PLAIN, _OWN = 12, 4  # how many chats of the battery and of the run itself are asked for
_TOOL: JsonObject = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "The tide at a <place> & an hour.",
        "parameters": {
            "type": "object",
            "required": ["place"],
            "properties": {"place": {"type": "string", "description": "its name"}, "hour": {"type": "integer"}},
        },
    },
}
_CALL: JsonObject = {"type": "function", "function": {"name": "get_tide", "arguments": {"place": "Genève", "hour": 2}}}
_ToolChat = tuple[list[JsonObject], list[JsonObject]]


@dataclass(frozen=True)
class PromptToAsk:
    """A conversation that ends where the model is to answer.

    Attributes:
        messages: The turns that a client sends, as training has them.
        tools: The tools that it offers.
        text: What training puts before the answer; without the BOS that it may begin with.
        bos: That BOS, or "".
        think: Whether the request asks for thoughts; None for one that says nothing.
    """

    messages: Sequence[JsonObject]
    tools: Sequence[JsonObject]
    text: str
    bos: str
    think: bool | None = None

    @property
    def roles(self) -> str:
        """Who speaks, in order."""
        return ", ".join(str(message["role"]) for message in self.messages)


def prompts_to_ask(
    tokenizer: Path, held_out: Path, description: ModelDescription, longest: int, capabilities: Collection[Capability]
) -> list[PromptToAsk]:
    """Return prompts with the texts that training has for them.

    Args:
        tokenizer: The folder of the trained tokenizer and template.
        held_out: The run's held-out chats, if it has any.
        description: The Modelfile, whose SYSTEM and MESSAGE come before the turns of a client.
        longest: The most tokens that the server reads.
        capabilities: What the model can do on the server.

    Raises:
        TemplateError, ModelError: There is no template, or it can't be used.
    """
    template = template_of(tokenizer)
    tools, sides = Capability.TOOLS in capabilities, _sides(template, capabilities)
    chats: list[_ToolChat] = [(messages, []) for messages in _plain_chats(template)]
    chats += _chats_with_tools(template) if tools else []
    chats += [(messages, offered) for messages, offered in _own_chats(held_out) if tools or not offered]
    prompts = (_prompt(template, description, *chat, *side) for chat in chats for side in sides)
    # A token has at least a byte.
    return [prompt for prompt in prompts if prompt is not None and len(prompt.text.encode()) < longest]


def _sides(template: ChatTemplate, capabilities: Collection[Capability]) -> list[tuple[bool | None, bool]]:
    """What requests may say about thoughts, and the value of the template's switches in training for each.

    Ollama sets one variable of a template, and only if it takes it for one that thinks.
    """
    if _OLLAMAS_SWITCH not in template.switches or Capability.THINKING not in capabilities:
        return [(None, False)]
    return [(True, True), (False, False)] if len(template.switches) == 1 else [(False, False)]


def _prompt(
    template: ChatTemplate,
    description: ModelDescription,
    messages: Sequence[JsonObject],
    tools: Sequence[JsonObject],
    think: bool | None,
    switched: bool,
) -> PromptToAsk | None:
    """The prompt of a conversation; None if the template refuses it."""
    turns: list[Mapping[str, object]] = [{"role": role, "content": text} for role, text in description.messages]
    turns += messages
    if description.system and messages[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": description.system})
    try:
        text = template.render(turns, tools, True, switched)
    except TemplateError:
        return None
    bos = template.special_tokens.get("bos_token", "")
    bos = bos if isinstance(bos, str) and text.startswith(bos) else ""
    return PromptToAsk(messages, tools, text.removeprefix(bos), bos, think)


def _plain_chats(template: ChatTemplate) -> list[list[JsonObject]]:
    """Some chats of the battery: each difficult text in each role, with and without a system turn."""
    try:
        template.render([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], None, True)
        chats = battery(system=True)
    except TemplateError:
        chats = battery(system=False)
    return chats[:: max(1, len(chats) // _PLAIN)][:_PLAIN]


def _chats_with_tools(template: ChatTemplate) -> list[_ToolChat]:
    """A question with a tool, and one that was answered with it, as far as the template writes them."""
    question: JsonObject = {"role": "user", "content": "How high is the tide?"}
    call: JsonObject = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    result: JsonObject = {"role": "tool", "name": "get_tide", "content": "21"}
    shown: list[_ToolChat] = []
    for messages, word in (([question], "get_tide"), ([question, call, result], "Gen")):
        with contextlib.suppress(TemplateError):
            if word in template.render(messages, [_TOOL], True):
                shown.append((messages, [_TOOL]))
    return shown


def _own_chats(held_out: Path) -> Iterator[_ToolChat]:
    """Yield some of the run's own chats, up to their last answer.

    Ollama hands no earlier thoughts to a template, so chats that have some are left out.
    """
    if not held_out.is_file():
        return
    with contextlib.suppress(KolotuneError), opened(held_out) as (_, records):
        for record in itertools.islice(records, _OWN):
            chat = read_chat(held_out, record).chat
            if chat is None:
                continue
            last = max(number for number, message in enumerate(chat.messages) if message.role == "assistant")
            before = chat.messages[:last]
            if before and all(message.reasoning is None for message in before):
                yield [message.as_dict() for message in before], list(chat.tools)


def as_request(turn: Mapping[str, object]) -> JsonObject:
    """Return a turn as Ollama's API has it."""
    request = dict(turn)
    if request["role"] == "tool" and "name" in request:
        request["tool_name"] = request.pop("name")
    return request
