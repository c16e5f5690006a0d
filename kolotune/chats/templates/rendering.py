"""Render one chat, and distinguish what the template wrote from what the chat contains.

The chat is rendered a second time with a mark instead of each text. The result is the skeleton: what the template
wrote, with slots for the texts. Example: for a question "Hi" and the answer "Hello", ChatML's skeleton is
``<|im_start|>user\\n▢<|im_end|>\\n<|im_start|>assistant\\n▢<|im_end|>\\n``. If the real rendering is the skeleton with
the texts in its slots, the position of every text is proven.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import TemplateError

from ..chat import Chat, Message, called_function
from .template import ChatTemplate, Slot

_SAMPLE_CALL: typed_storage.JsonObject = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "a", "arguments": {}},
}
Span = tuple[int, int]
_Path = tuple["_Path", Span] | None
OTHER_TEMPLATE = "; --chat-template FILE trains with another"


@dataclass(frozen=True)
class FilledSkeleton:
    """A rendering with marks instead of texts, and the texts.

    Attributes:
        text: The rendering, marks included.
        pieces: What the template wrote before, between and behind the marks; one more than `slots`.
        slots: The text that each mark replaces, in the order of the rendering.
        values: The chat's text for each slot, including those that the template left out.
    """

    text: str
    pieces: list[str]
    slots: list[Slot]
    values: dict[Slot, str]

    def fit(self, text: str) -> list[Span] | None:
        """Find each slot in the rendering of the chat itself.

        Returns:
            The span of each slot in the text. None if the text is not this skeleton with the chat's texts: the
            template then behaves differently for different texts.
        """
        paths: dict[int, _Path] = {len(self.pieces[0]): None} if text.startswith(self.pieces[0]) else {}
        for slot, piece in zip(self.slots, self.pieces[1:], strict=True):
            longer: dict[int, _Path] = {}
            for start, path in paths.items():
                for value in _variants(self.values[slot]):
                    if text.startswith(value + piece, start):
                        end = start + len(value)
                        longer.setdefault(end + len(piece), (path, (start, end)))
            paths = longer
        if len(text) not in paths:
            return None
        path, spans = paths[len(text)], []
        while path is not None:
            path, span = path
            spans.append(span)
        return spans[::-1]


class Rendering:
    """One rendered chat.

    Attributes:
        messages: The messages as the template got them.
        tools: The tool definitions as the template got them.
        text: The whole rendering.
        mark: A character that occurs neither in the chat nor in its rendering.

    Raises:
        TemplateError: The template refuses the chat.
    """

    def __init__(self, chat: Chat, template: ChatTemplate) -> None:
        self.template = template
        self.tools = [copy.deepcopy(tool) for tool in chat.tools]
        self.messages: Sequence[Message] = [_with_parsed_arguments(message) for message in chat.messages]
        try:
            self.text = self.render()
        except TemplateError:
            # Arguments are JSON text in the OpenAI format. Most templates want the object (a text would be quoted a
            # second time), a few want the text.
            if list(self.messages) == list(chat.messages):
                raise
            self.messages = chat.messages
            self.text = self.render()
        strings = json.dumps([self.message_dicts(), self.tools], ensure_ascii=False) + self.text
        self.mark = next(c for c in map(chr, range(0x100000, 0x10FFFE)) if c not in strings)

    def message_dicts(self) -> list[typed_storage.JsonObject]:
        """Return the messages as chat templates expect them."""
        return [message.as_dict() for message in self.messages]

    def render(self, upto: int | None = None, prompt: bool = False) -> str:
        """Render the messages before this number, or all; `prompt` opens the answer of this number."""
        dicts = [message.as_dict() for message in self.messages[:upto]]
        return self.template.render(dicts, self.tools, prompt, self._thinks(upto, prompt))

    def skeleton(
        self, only: Collection[int] | None = None, upto: int | None = None, prompt: bool = False
    ) -> FilledSkeleton:
        """Render the chat with marks instead of its texts.

        Args:
            only: The numbers of the messages to mark; None for all.
            upto: Render the messages before this number; None for all.
            prompt: Open the assistant's next turn.

        Raises:
            TemplateError: The template refuses it.
        """
        values: dict[Slot, str] = {}
        marked = []
        for index, message in enumerate(self.messages[:upto]):
            texts = texts_of(message) if only is None or index in only else {}
            values |= {(index, name): value for name, value in texts.items()}
            marked.append(_with_texts(message, {name: f"{self.mark}{index}{name}{self.mark}" for name in texts}))
        thinks = self._thinks(upto, prompt)
        return FilledSkeleton(*self.template.skeleton(marked, self.tools, prompt, self.mark, thinks), values)

    def _thinks(self, upto: int | None, prompt: bool) -> bool:
        """Whether the answer that is asked for, or the last one that is there, has a thought."""
        if not self.template.switches:
            return False
        if prompt:
            return has_thought(self.messages[upto or 0])
        answers = [message for message in self.messages[:upto] if message.role == "assistant"]
        return bool(answers) and has_thought(answers[-1])

    def shows(self, index: int) -> bool:
        """Whether the template writes the content of one message anywhere."""
        try:
            return (index, "content") in self.skeleton({index}).slots
        except TemplateError:
            return self.messages[index].content.strip() in self.text

    def around_reasoning(self, index: int, calls_tool: bool = False) -> tuple[str, str] | None:
        """Return what the template writes before and behind the reasoning of an answer that is the last message.

        Args:
            index: The number of the answer, whether it has reasoning or not.
            calls_tool: Let the answer call a tool, if it does not.

        Returns:
            None if the template writes no reasoning there.
        """
        message = self.messages[index]
        thought = message.reasoning
        if inline := inline_reasoning(message):
            thought = inline[1]
            message = dataclasses.replace(message, content=inline[2])
        if not thought or not thought.strip():
            thought = "thought"
        calls = message.tool_calls or (_SAMPLE_CALL,) * calls_tool
        answer = dataclasses.replace(message, reasoning=thought, tool_calls=calls)
        marked = [
            _with_texts(each, {name: f"{self.mark}{number}{name}{self.mark}" for name in texts_of(each)})
            for number, each in enumerate([*self.messages[:index], answer])
        ]
        try:
            thinks = self._thinks(index + 1, prompt=False)
            _, pieces, slots = self.template.skeleton(marked, self.tools, False, self.mark, thinks)
        except TemplateError:
            return None
        for at, (slot, following) in enumerate(pairwise(slots)):
            if slot == (index, "reasoning") and following[0] == index:
                return pieces[at], pieces[at + 1]
        return None

    def shows_tools(self) -> bool:
        """Whether the template writes the name of each tool that the chat offers."""
        tools = copy.deepcopy(self.tools)
        names = [f"{self.mark}{number}{self.mark}" for number in range(len(tools))]
        for tool, name in zip(tools, names, strict=True):
            called_function(tool)["name"] = name
        text = self.template.render(self.message_dicts(), tools, thinks=self._thinks(None, prompt=False))
        return all(name in text for name in names)


def texts_of(message: Message) -> dict[str, str]:
    """Return the texts of a message that can be marked.

    Returns:
        Of ``content``, ``reasoning`` (also if the content has it as ``<think>…</think>``) and ``call`` (the name of
        the last tool called) those that are not blank: templates ask whether a text is empty, so a mark instead
        would change what they do.
    """
    inline = inline_reasoning(message)
    texts = {"content": message.content, "reasoning": message.reasoning or ""}
    if inline:
        texts = {"reasoning": inline[1], "content": inline[2]}
    if message.tool_calls:
        texts["call"] = str(called_function(message.tool_calls[-1]).get("name", ""))
    return {name: value for name, value in texts.items() if value.strip()}


def has_thought(message: Message) -> bool:
    """Whether a message has reasoning that is not blank, apart or at the start of its content."""
    return "reasoning" in texts_of(message)


def with_separate_thoughts(chat: Chat) -> Chat:
    """Return the chat with thoughts that are part of a content as reasoning."""
    messages = []
    for message in chat.messages:
        if inline := inline_reasoning(message):
            message = dataclasses.replace(message, reasoning=inline[1].strip(), content=inline[2].lstrip("\n"))
        messages.append(message)
    return dataclasses.replace(chat, messages=tuple(messages))


def check_shown(chat: Chat, rendering: Rendering, skeleton: FilledSkeleton) -> None:
    """Check with the skeleton of all texts that the template writes everything that the chat contains.

    Raises:
        TemplateError: Tools, a tool call, a result or a content is missing.
    """
    if chat.tools and not rendering.shows_tools():
        raise TemplateError(f"the chat template does not write tools{OTHER_TEMPLATE}")
    for index, message in enumerate(chat.messages):
        missing = {name for name in texts_of(rendering.messages[index]) if (index, name) not in skeleton.slots}
        if "content" in missing and not rendering.shows(index):
            raise TemplateError(f"the chat template leaves out {_describe(message)}{OTHER_TEMPLATE}")
        if "call" in missing:
            raise TemplateError(f"the chat template does not write tool calls{OTHER_TEMPLATE}")


def _describe(message: Message) -> str:
    if message.role == "assistant":
        return "the text beside a tool call" if message.tool_calls else "an answer"
    return {"system": "system messages", "tool": "the results of tools"}.get(message.role, "a user's message")


def _with_texts(message: Message, texts: dict[str, str]) -> Message:
    """Return the message with some of the texts that `texts_of` names replaced."""
    inline = inline_reasoning(message)
    content, reasoning, calls = message.content, message.reasoning, message.tool_calls
    if inline:
        opening, thought, answer = inline
        content = f"{opening}{texts.get('reasoning', thought)}</think>{texts.get('content', answer)}"
    else:
        content, reasoning = texts.get("content", content), texts.get("reasoning", reasoning)
    if "call" in texts:
        calls = copy.deepcopy(calls)
        called_function(calls[-1])["name"] = texts["call"]
    return dataclasses.replace(message, content=content, reasoning=reasoning, tool_calls=calls)


def inline_reasoning(message: Message) -> tuple[str, str, str] | None:
    """Split an answer that starts with ``<think>…</think>`` into the opening, the reasoning and the answer."""
    if message.role != "assistant" or message.reasoning or "</think>" not in message.content:
        return None
    parts = message.content.split("</think>")
    if len(parts) != 2:
        return None
    before, opening, thought = parts[0].rpartition("<think>")
    return None if before.strip() else (before + opening, thought, parts[1])


def _with_parsed_arguments(message: Message) -> Message:
    """Return the message with arguments of tool calls as objects where they are JSON text of one."""
    if not message.tool_calls:
        return message
    calls = copy.deepcopy(message.tool_calls)
    for call in calls:
        function = called_function(call)
        if isinstance(arguments := function.get("arguments"), str):
            try:
                function["arguments"] = typed_storage.parse_object(arguments)
            except typed_storage.StorageError:
                continue
    return dataclasses.replace(message, tool_calls=calls)


def _variants(value: str) -> list[str]:
    """Return what a template may make of a text: it may trim it, or write it as JSON."""
    variants = [value]
    if value != value.strip():
        variants += [value.strip("\n"), value.lstrip("\n"), value.rstrip("\n")]
        variants += [value.strip(), value.lstrip(), value.rstrip()]
    return list(dict.fromkeys([*variants, json.dumps(value, ensure_ascii=False)[1:-1]]))
