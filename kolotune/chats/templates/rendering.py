"""One rendered chat, and what in it the template wrote.

`Rendering` is a chat's rendering with its `Skeleton`: the same with marks in place of the contents, which tells apart
what the template wrote and what the chat holds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from kolotune.foundation.errors import TemplateError

from ..chat import Chat, Message, called_function
from .template import ChatTemplate, Slot

Span = tuple[int, int]


@dataclass(frozen=True)
class Skeleton:
    """A rendering with marks in place of contents.

    Attributes:
        text: the rendering, marks included.
        pieces: what the template wrote before, between and behind the marks; one more than slots.
        slots: which text each mark stands for, in the order of the rendering.
        values: the text that the chat has for each mark, also for those that the template left out.
    """

    text: str
    pieces: list[str]
    slots: list[Slot]
    values: dict[Slot, str]

    def fit(self, text: str) -> list[Span] | None:
        """Lay the real rendering over the skeleton.

        Args:
            text: the rendering of the chat itself.

        Returns:
            For each slot where it stands in the text, or None when the text is not this skeleton filled with
            the chat's contents: the template then does other things for other contents.
        """
        paths: dict[int, Any] = {len(self.pieces[0]): None} if text.startswith(self.pieces[0]) else {}
        for slot, piece in zip(self.slots, self.pieces[1:], strict=True):
            further: dict[int, Any] = {}
            for at, path in paths.items():
                for value in _variants(self.values[slot]):
                    if text.startswith(value + piece, at):
                        further.setdefault(at + len(value) + len(piece), (path, (at, at + len(value))))
            paths = further
        if len(text) not in paths:
            return None
        path, spans = paths[len(text)], []
        while path is not None:
            path, span = path
            spans.append(span)
        return spans[::-1]


class Rendering:
    """One chat, rendered.

    Args:
        chat: the chat.
        template: the template to render it with.

    Attributes:
        messages: the messages as they were given to the template.
        tools: the tool definitions as they were given to the template.
        text: the whole rendering.
        mark: a character that neither the chat nor its rendering holds.

    Raises:
        TemplateError: the template refuses the chat.
    """

    def __init__(self, chat: Chat, template: ChatTemplate) -> None:
        self.template = template
        self.tools = [copy.deepcopy(tool) for tool in chat.tools]
        self.messages = [_with_objects(message) for message in chat.message_dicts()]
        try:
            self.text = self.render(self.messages)
        except TemplateError:
            # Arguments are JSON text in the OpenAI shape. Most templates want the object (text would be
            # quoted a second time), a few want the text.
            if self.messages == chat.message_dicts():
                raise
            self.messages = chat.message_dicts()
            self.text = self.render(self.messages)
        strings = json.dumps([self.messages, self.tools], ensure_ascii=False) + self.text
        self.mark = next(c for c in map(chr, range(0x100000, 0x10FFFE)) if c not in strings)

    def render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """Render other messages with this chat's tools; `prompt` opens the assistant's next turn."""
        return self.template.render(messages, self.tools, add_generation_prompt=prompt)

    def skeleton(self, only: Collection[int] | None = None, upto: int | None = None, prompt: bool = False) -> Skeleton:
        """The rendering with marks in place of the texts.

        Args:
            only: the numbers of the messages to mark; None for all.
            upto: render the messages before this number; None for all.
            prompt: open the assistant's next turn.

        Returns:
            What was rendered.

        Raises:
            TemplateError: the template refuses it.
        """
        values: dict[Slot, str] = {}
        marked = []
        for index, message in enumerate(self.messages[:upto]):
            texts = texts_of(message) if only is None or index in only else {}
            values |= {(index, name): value for name, value in texts.items()}
            marks = {name: f"{self.mark}{index}{name}{self.mark}" for name in texts}
            marked.append(_with_texts(message, marks))
        return Skeleton(*self.template.skeleton(marked, self.tools, prompt, self.mark), values)

    def shows(self, index: int) -> bool:
        """Whether the template writes the content of one message anywhere."""
        try:
            return (index, "content") in self.skeleton({index}).slots
        except TemplateError:
            return str(self.messages[index]["content"]).strip() in self.text

    def shows_tools(self) -> bool:
        """Whether the template writes the name of each tool that the chat offers."""
        tools = copy.deepcopy(self.tools)
        names = [f"{self.mark}{number}{self.mark}" for number in range(len(tools))]
        for tool, name in zip(tools, names, strict=True):
            called_function(tool)["name"] = name
        text = self.template.render(self.messages, tools)
        return all(name in text for name in names)


def texts_of(message: dict[str, Any]) -> dict[str, str]:
    """The texts of a message that can be marked.

    Args:
        message: a message as templates get it.

    Returns:
        Of ``content``, ``reasoning`` (also when written into the content as ``<think>…</think>``) and
        ``call`` (the name of the last tool called) those that are not blank: templates ask whether a text is
        empty, so a mark in its place would change what they do.
    """
    inline = _inline(message)
    texts = {"content": message["content"], "reasoning": message.get("reasoning_content") or ""}
    if inline:
        texts = {"reasoning": inline[1], "content": inline[2]}
    if message.get("tool_calls"):
        texts["call"] = _function(message["tool_calls"][-1]).get("name", "")
    return {name: value for name, value in texts.items() if value.strip()}


def check_shown(chat: Chat, rendering: Rendering, skeleton: Skeleton) -> None:
    """Refuse a chat of which the template leaves out what it has no place for.

    Args:
        chat: the chat.
        rendering: its rendering.
        skeleton: the rendering with all texts marked.

    Raises:
        TemplateError: tools, a tool call, a result, the reasoning of the last answer or a content is missing.
    """
    if chat.tools and not rendering.shows_tools():
        raise TemplateError("this base model's template has no place for tools")
    last_user = max((i for i, message in enumerate(chat.messages) if message.role == "user"), default=-1)
    last_answer = max((i for i, message in enumerate(chat.messages) if message.role == "assistant"), default=-1)
    for index, message in enumerate(chat.messages):
        missing = {name for name in texts_of(rendering.messages[index]) if (index, name) not in skeleton.slots}
        if "content" in missing and not rendering.shows(index):
            raise TemplateError(f"this base model's template leaves out {_kind(message)}")
        if "call" in missing:
            raise TemplateError("this base model's template has no place for tool calls")
        # Thinking of earlier exchanges may be dropped: these models are served so.
        if "reasoning" in missing and index == last_answer > last_user:
            raise TemplateError("this base model's template has no place for reasoning")


def _kind(message: Message) -> str:
    """What a message is, for the user."""
    if message.role == "assistant":
        return "the text beside a tool call" if message.tool_calls else "an answer"
    return {"system": "system messages", "tool": "the results of tools"}.get(message.role, "a user's message")


def _with_texts(message: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    """The message with some of the texts that `texts_of` names replaced."""
    inline = _inline(message)
    message = copy.deepcopy(message) if "tool_calls" in message else dict(message)
    if inline:
        opening, thinking, answer = inline
        thinking, answer = texts.get("reasoning", thinking), texts.get("content", answer)
        message["content"] = f"{opening}{thinking}</think>{answer}"
    else:
        names = {"content": "content", "reasoning_content": "reasoning"}
        message |= {key: texts[name] for key, name in names.items() if name in texts}
    if "call" in texts:
        _function(message["tool_calls"][-1])["name"] = texts["call"]
    return message


def _inline(message: dict[str, Any]) -> tuple[str, str, str] | None:
    """Thinking that an answer opens with as ``<think>…</think>``: the opening, the thinking, the answer."""
    if message["role"] != "assistant" or message.get("reasoning_content") or "</think>" not in message["content"]:
        return None
    parts = message["content"].split("</think>")
    if len(parts) != 2:
        return None
    before, opening, thinking = parts[0].rpartition("<think>")
    return None if before.strip() else (before + opening, thinking, parts[1])


def _function(call: dict[str, Any]) -> dict[str, Any]:
    """The part of a tool call that has its name; some files leave the shell around it out."""
    function: dict[str, Any] = call.get("function", call)
    return function


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its tool calls as objects where they are JSON text."""
    if "tool_calls" not in message:
        return message
    message = copy.deepcopy(message)
    for call in message["tool_calls"]:
        arguments = _function(call).get("arguments")
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except ValueError:
                continue
            if isinstance(parsed, dict):
                _function(call)["arguments"] = parsed
    return message


def _variants(value: str) -> list[str]:
    """What a template may make of a text: it may trim it, or write it as JSON."""
    forms = [value]
    if value != value.strip():
        forms += [value.strip("\n"), value.lstrip("\n"), value.rstrip("\n")]
        forms += [value.strip(), value.lstrip(), value.rstrip()]
    return list(dict.fromkeys([*forms, json.dumps(value, ensure_ascii=False)[1:-1]]))
