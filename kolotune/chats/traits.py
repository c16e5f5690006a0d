"""Traits of chats that chat templates and tokenizers treat each in their own way.

What a server makes of a trait can be asked before training, with a short chat that has it. Whether that matters depends
on whether the trained chats have it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import lru_cache

from .chat import Chat, Message, called_function

_QUOTED = frozenset("\"'\\<>&/\n\t")


class ChatTrait(StrEnum):
    """A trait of what stands before an answer; the value is its name on disk."""

    QUESTION = "question"
    SYSTEM = "system"
    EMPTY_SYSTEM = "empty-system"
    TURNS = "turns"
    TOOLS = "tools"
    TOOLS_AND_SYSTEM = "tools-and-system"
    RICH_TOOLS = "rich-tools"
    CALL = "call"
    PARALLEL_CALLS = "parallel-calls"
    CALL_AND_TEXT = "call-and-text"
    CALL_WITHOUT_ARGUMENTS = "call-without-arguments"
    RICH_CALL = "rich-call"
    TURNS_AFTER_CALL = "turns-after-call"
    THOUGHTS = "thoughts"
    THOUGHTS_BEFORE_CALL = "thoughts-before-call"
    SPACES = "spaces"
    COMBINING_MARKS = "combining-marks"
    COMPATIBILITY_FORMS = "compatibility-forms"

    @property
    def sentence(self) -> str:
        """What a chat with this trait has."""
        return _SENTENCES[self]


_SENTENCES = {
    ChatTrait.QUESTION: "a question without a system turn",
    ChatTrait.SYSTEM: "a system turn",
    ChatTrait.EMPTY_SYSTEM: "an empty system turn",
    ChatTrait.TURNS: "several exchanges",
    ChatTrait.TOOLS: "tools without a system turn",
    ChatTrait.TOOLS_AND_SYSTEM: "tools and a system turn",
    ChatTrait.RICH_TOOLS: "tools described with quotes, line breaks or letters beyond ASCII",
    ChatTrait.CALL: "a tool call and its result",
    ChatTrait.PARALLEL_CALLS: "several tool calls in one turn",
    ChatTrait.CALL_AND_TEXT: "a tool call beside a text",
    ChatTrait.CALL_WITHOUT_ARGUMENTS: "a tool call without arguments",
    ChatTrait.RICH_CALL: "tool calls with nested arguments, quotes, line breaks or letters beyond ASCII",
    ChatTrait.TURNS_AFTER_CALL: "an exchange after a tool call",
    ChatTrait.THOUGHTS: "thoughts in an earlier answer",
    ChatTrait.THOUGHTS_BEFORE_CALL: "thoughts before a tool call",
    ChatTrait.SPACES: "texts that begin or end with spaces",
    ChatTrait.COMBINING_MARKS: "letters with separate accents (Unicode that is not in composed form, NFC)",
    ChatTrait.COMPATIBILITY_FORMS: "characters that stand for others, such as ligatures (Unicode that NFKC replaces)",
}


def traits_of(chat: Chat) -> frozenset[ChatTrait]:
    """Return the traits of what stands before the chat's answers."""
    before = chat.messages[:-1]
    texts = [message.content for message in before]
    roles = tuple([message.role for message in before])
    is_empty = bool(roles) and roles[0] == "system" and not texts[0].strip()
    is_spaced = any([text != text.strip() for text in texts])
    forms = _forms_of(texts)
    traits = _traits_of_texts(roles, bool(chat.tools), is_empty, is_spaced)
    if chat.is_plain or (not chat.tools and all([message.is_plain for message in before])):
        return traits | forms if forms else traits
    return traits | forms | frozenset(_traits_of_tools_and_thoughts(chat))


def texts_of(chat: Chat) -> Iterator[str]:
    """Yield every text of a chat."""
    for message in (*chat.messages, *chat.rejected):
        yield message.content
        if not message.is_plain:
            yield from _texts_in((message.reasoning, message.tool_calls, message.name))
    yield from _texts_in(chat.tools)


def _forms_of(texts: Iterable[str]) -> frozenset[ChatTrait]:
    """Return the traits of texts that normalizers of tokenizers change."""
    traits = set()
    for text in texts:
        if text.isascii() or unicodedata.is_normalized("NFKC", text):  # then it is in composed form, too
            continue
        if unicodedata.is_normalized("NFC", text):
            traits.add(ChatTrait.COMPATIBILITY_FORMS)
        else:
            traits.add(ChatTrait.COMBINING_MARKS)
            if unicodedata.normalize("NFKC", text) != unicodedata.normalize("NFC", text):
                traits.add(ChatTrait.COMPATIBILITY_FORMS)
    return frozenset(traits)


@lru_cache(1024)
def _traits_of_texts(roles: tuple[str, ...], has_tools: bool, is_empty: bool, is_spaced: bool) -> frozenset[ChatTrait]:
    traits = set()
    if roles[:1] == ("system",):
        traits.add(ChatTrait.TOOLS_AND_SYSTEM if has_tools else ChatTrait.SYSTEM)
    else:
        traits.add(ChatTrait.TOOLS if has_tools else ChatTrait.QUESTION)
    if is_empty:
        traits.add(ChatTrait.EMPTY_SYSTEM)
    if roles.count("user") > 1:
        traits.add(ChatTrait.TURNS)
    if is_spaced:
        traits.add(ChatTrait.SPACES)
    return frozenset(traits)


def _traits_of_tools_and_thoughts(chat: Chat) -> Iterator[ChatTrait]:
    if any(map(_is_rich, chat.tools)):
        yield ChatTrait.RICH_TOOLS
    before = chat.messages[:-1]
    structured = [chat.tools, *((message.reasoning, message.tool_calls) for message in before)]
    yield from _forms_of(_texts_in(structured))
    for index, message in enumerate(before):
        yield from _traits_beyond_text(message, before[index + 1 :])


def _traits_beyond_text(message: Message, after: tuple[Message, ...]) -> Iterator[ChatTrait]:
    if message.reasoning is not None:
        yield ChatTrait.THOUGHTS_BEFORE_CALL if message.tool_calls else ChatTrait.THOUGHTS
    if not message.tool_calls:
        return
    yield ChatTrait.CALL
    if len(message.tool_calls) > 1:
        yield ChatTrait.PARALLEL_CALLS
    if message.content.strip():
        yield ChatTrait.CALL_AND_TEXT
    if any(later.role == "user" for later in after):
        yield ChatTrait.TURNS_AFTER_CALL
    arguments = [called_function(call).get("arguments") for call in message.tool_calls]
    if any(not values for values in arguments):
        yield ChatTrait.CALL_WITHOUT_ARGUMENTS
    results = [later.content for later in after if later.role == "tool"]
    if any(map(_is_nested, arguments)) or any(map(_is_rich, [*arguments, *results])):
        yield ChatTrait.RICH_CALL


def _is_nested(arguments: object) -> bool:
    return isinstance(arguments, dict) and any(isinstance(value, list | dict) for value in arguments.values())


def _is_rich(value: object) -> bool:
    """Whether a text in a JSON value may be written in more than one way."""
    if isinstance(value, str):
        return not value.isascii() or not _QUOTED.isdisjoint(value)
    if isinstance(value, dict):
        return any(_is_rich(name) or _is_rich(content) for name, content in value.items())
    return isinstance(value, list) and any(map(_is_rich, value))


def _texts_in(value: object) -> Iterator[str]:
    """Yield every text in a JSON value, the names of fields, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts_in([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)
