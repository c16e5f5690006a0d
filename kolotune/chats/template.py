"""The chat template: one text that is stored, trained on and served.

`freeze_date` turns a template that asks for today's date into one that states a date, so that the text does
not change from one day to the next. `ChatTemplate` renders chats through transformers' own environment.
`Rendering` is one rendered chat with its `Skeleton`: the same rendering with marks in place of the contents,
which tells apart what the template wrote and what the chat holds.
"""

from __future__ import annotations

import ast
import copy
import datetime
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kolotune.chats import Chat, Message
from kolotune.errors import TemplateError

Span = tuple[int, int]
# A place for text in a chat: the number of its message, and "content", "reasoning" or "call" (a tool's name).
Slot = tuple[int, str]

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

# Comments come first, so that a call that is only mentioned in one is left alone.
_DATE_USE = re.compile(
    r"""(?P<comment>\{\#.*?\#\})
      | \bstrftime_now\s*\(\s*(?:format\s*=\s*)?
        (?P<literal>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*\)
      | \bstrftime_now\s+is\s+(?P<negated>not\s+)?(?P<test>defined|undefined)\b""",
    re.DOTALL | re.VERBOSE,
)


def depends_on_date(jinja: str) -> bool:
    """Whether the template asks for the current date.

    Args:
        jinja: the template's source.

    Returns:
        True when ``strftime_now`` is used in an expression; a comment or plain text does not count.

    Raises:
        TemplateError: the source mentions ``strftime_now`` and is not valid Jinja.
    """
    return "strftime_now" in jinja and _uses(jinja) > 0


def freeze_date(jinja: str, date: datetime.date) -> str:
    """Write a date into a template that would otherwise ask for the current one.

    Args:
        jinja: the template's source.
        date: the date to write; a time in a format becomes midnight.

    Returns:
        The source with every ``strftime_now("…")`` replaced by a string literal and every
        ``strftime_now is defined`` by ``true``; the very same text when there is nothing to replace.

    Raises:
        TemplateError: the template is not valid Jinja, or asks for the date in a way that can't be written
            down beforehand: a format that is computed, or a directive with no meaning for a date.
    """
    if not depends_on_date(jinja):
        return jinja
    replaced = 0

    def literal(match: re.Match[str]) -> str:
        nonlocal replaced
        if match["comment"] is not None:
            return match[0]
        replaced += 1
        if match["test"] is not None:
            return "true" if (match["test"] == "defined") != bool(match["negated"]) else "false"
        quote = match["literal"][0]
        text = _strftime(date, _string(match["literal"]))
        return quote + text.replace("\\", "\\\\").replace(quote, "\\" + quote).replace("\n", "\\n") + quote

    frozen = _DATE_USE.sub(literal, jinja)
    # Counted on the parsed template: text that only looks like a call must not have been touched, and no call
    # may be left.
    if replaced != _uses(jinja) or _uses(frozen) > 0:
        raise TemplateError(
            "the chat template asks for the current date in a way that can't be fixed to one date",
            "Write the date into the template as plain text, or choose another base model.",
        )
    return frozen


class ChatTemplate:
    """A chat template with the special tokens that it may name.

    Args:
        jinja: the template's source.
        special_tokens: ``bos_token``, ``eos_token``, … as the tokenizer has them; None values are left out.

    Attributes:
        jinja: the template's source.
        special_tokens: name to text.

    Raises:
        TemplateError: there is no template, or it is not valid Jinja.
    """

    def __init__(self, jinja: str | None, special_tokens: Mapping[str, Any]) -> None:
        if not jinja or not jinja.strip():
            raise TemplateError(
                "the base model has no chat template",
                "Use an instruction-tuned model: its tokenizer comes with a chat template.",
            )
        _compiled(jinja)
        self.jinja = jinja
        self.special_tokens = {
            name: [str(one) for one in token] if isinstance(token, (list, tuple)) else str(token)
            for name, token in special_tokens.items()
            if token is not None
        }

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a chat, as transformers' ``apply_chat_template`` writes it.

        Args:
            messages: the turns, each with ``role`` and ``content``.
            tools: tool definitions in the OpenAI shape; None and an empty list are the same.
            add_generation_prompt: end with the opening of the assistant's next turn.

        Returns:
            The text, with the special tokens (also the first one) written out.

        Raises:
            TemplateError: the template refuses these messages, or fails on them; with its own words.
        """
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        # The template is a program that came with the model: whatever it raises is its own failure.
        try:
            rendered, _ = render(
                conversations=[messages],
                tools=tools or None,
                chat_template=self.jinja,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:
            raise TemplateError(f"the chat template refuses these messages: {_words(error)}") from error
        return str(rendered[0])


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
        text = self.render(marked, prompt)
        found = re.split(rf"{self.mark}(\d+)([a-z]+){self.mark}", text)
        slots = [(int(index), name) for index, name in zip(found[1::3], found[2::3], strict=True)]
        return Skeleton(text, found[::3], slots, values)

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
            tool.get("function", tool)["name"] = name
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
    message = copy.deepcopy(message)
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
    if message["role"] != "assistant" or message.get("reasoning_content"):
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
    message = copy.deepcopy(message)
    for call in message.get("tool_calls", ()):
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
    forms = [value, value.strip("\n"), value.lstrip("\n"), value.rstrip("\n")]
    forms += [value.strip(), value.lstrip(), value.rstrip(), json.dumps(value, ensure_ascii=False)[1:-1]]
    return list(dict.fromkeys(forms))


def _compiled(jinja: str) -> Any:
    """The template in transformers' sandboxed environment (cached there)."""
    from transformers.utils import chat_template_utils

    compile_template: Any = chat_template_utils._compile_jinja_template
    try:
        return compile_template(jinja)
    except Exception as error:
        raise TemplateError(f"the chat template is not valid Jinja: {_words(error)}") from error


def _uses(jinja: str) -> int:
    """How often ``strftime_now`` stands in an expression of the template."""
    from jinja2 import nodes

    tree = _compiled(jinja).environment.parse(jinja)
    return sum(name.name == "strftime_now" for name in tree.find_all(nodes.Name))


def _words(error: Exception) -> str:
    """An error's message on one line; the type only where the message does not stand on its own."""
    from jinja2 import exceptions

    message = " ".join(str(error).split())
    if isinstance(error, exceptions.TemplateSyntaxError):
        return f"{' '.join((error.message or '').split())} (line {error.lineno})"
    if isinstance(error, exceptions.TemplateError) and message:
        return message
    return f"{type(error).__name__}: {message}"


def _string(literal: str) -> str:
    """The value of a string literal of Jinja, whose escapes are Python's."""
    try:
        return str(ast.literal_eval(literal.replace("\n", "\\n")))
    except (SyntaxError, ValueError) as error:
        raise TemplateError(f"the chat template has a date format that can't be read: {literal}") from error


def _strftime(date: datetime.date, pattern: str) -> str:
    """``date.strftime`` with English names whatever the locale is, and the same on every system."""
    values = {
        "a": _WEEKDAYS[date.weekday()][:3],
        "A": _WEEKDAYS[date.weekday()],
        "b": _MONTHS[date.month - 1][:3],
        "h": _MONTHS[date.month - 1][:3],
        "B": _MONTHS[date.month - 1],
        "d": f"{date.day:02}",
        "e": f"{date.day:2}",
        "m": f"{date.month:02}",
        "y": f"{date.year % 100:02}",
        "Y": f"{date.year:04}",
        "j": f"{date.timetuple().tm_yday:03}",
        "u": str(date.isoweekday()),
        "w": str(date.isoweekday() % 7),
        "D": f"{date.month:02}/{date.day:02}/{date.year % 100:02}",
        "F": date.isoformat(),
        "H": "00",
        "I": "12",
        "M": "00",
        "S": "00",
        "f": "000000",
        "p": "AM",
        "R": "00:00",
        "T": "00:00:00",
        "z": "",
        "Z": "",
        "%": "%",
    }

    def value(match: re.Match[str]) -> str:
        if match["name"] not in values:
            raise TemplateError(f"the chat template asks for {match[0]} of the date, which can't be fixed")
        text = values[match["name"]]
        return (text.lstrip("0 ") or "0") if match["unpadded"] else text

    return re.sub(r"%(?P<unpadded>[-#]?)(?P<name>.?)", value, pattern, flags=re.DOTALL)
