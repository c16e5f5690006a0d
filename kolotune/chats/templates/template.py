"""The chat template of a base model: one text that is stored, trained on and served."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from kolotune.foundation.errors import TemplateError

from ..chat import Message
from . import sandbox
from .signature import TemplateSignature
from .template_binding import switches_of

Slot: TypeAlias = tuple[int, str]
"""A text in a chat: the number of its message, and "content", "reasoning" or "call" (the name of a tool)."""
Skeleton: TypeAlias = tuple[str, list[str], list[Slot]]
"""A rendering with marks instead of texts, the pieces around the marks, and the slots of the marks."""

_MOST_SKELETONS = 1_000
_MOST_CHARACTERS = 1 << 20  # the longest known template has 30,000


class ChatTemplate:
    """A chat template with the special tokens that it may name.

    Args:
        jinja: The template's source.
        special_tokens: ``bos_token``, ``eos_token``, … as the tokenizer has them; None values are left out.

    Attributes:
        switches: The variables that are true for answers with thoughts and false for others (``--template-switch``).

    Raises:
        TemplateError: There is no template, or it is not valid Jinja.
    """

    def __init__(self, jinja: str | None, special_tokens: Mapping[str, object]) -> None:
        if not jinja or not jinja.strip():
            raise TemplateError(
                "the base model has no chat template",
                "Use an instruction-tuned model: its tokenizer comes with a chat template.",
            )
        if len(jinja) > _MOST_CHARACTERS:
            raise TemplateError(f"the chat template is longer than {_MOST_CHARACTERS} characters")
        sandbox.uses_of_date(jinja)  # that is, check that it can be parsed
        self._skeletons: dict[tuple[bool, str, bool, tuple[Message, ...]], Skeleton] = {}
        self.jinja = jinja
        self.switches = switches_of(jinja)
        self.special_tokens = {
            name: [str(one) for one in token] if isinstance(token, list | tuple) else str(token)
            for name, token in special_tokens.items()
            if token is not None
        }

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, dict[str, str | list[str]]]]:
        return ChatTemplate, (self.jinja, self.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = False,
        thinks: bool = False,
    ) -> str:
        """Render a chat as transformers' ``apply_chat_template`` does.

        Args:
            messages: The turns, each with ``role`` and ``content``.
            tools: Tool definitions in the OpenAI format; None and an empty list are the same.
            add_generation_prompt: End with the opening of the assistant's next turn.
            thinks: The value of the template's switches: whether the answer has thoughts. A template without
                switches writes the same for both.

        Returns:
            The text, with all special tokens written out, the first one included.

        Raises:
            TemplateError: The template refuses these messages or fails on them (the message is the template's own),
                or takes too much time, memory or space.
        """
        variables = {"add_generation_prompt": add_generation_prompt, **self.special_tokens, **self._values(thinks)}
        return sandbox.render(self.jinja, messages, tools or None, variables)

    def _values(self, thinks: bool) -> dict[str, bool]:
        return dict.fromkeys(self.switches, thinks)

    def signature(self, roles: Sequence[str], prompt: bool, thinks: bool = False) -> TemplateSignature | None:
        """Return what the template writes around the texts of turns with these roles.

        Args:
            roles: Who speaks; each turn is a role and a text that is not blank.
            prompt: Open the assistant's next turn.
            thinks: As for `render`.

        Returns:
            The signature, or None if what the template writes depends on the texts.

        Raises:
            TemplateError: The template refuses these turns, or takes too much.
        """
        variables: dict[str, object] = {"add_generation_prompt": prompt, **self.special_tokens, **self._values(thinks)}
        variables |= {"tools": None, "documents": None}
        return sandbox.signature(self.jinja, list(roles), variables)

    def skeleton(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]],
        prompt: bool,
        mark: str,
        thinks: bool = False,
    ) -> Skeleton:
        """Render messages whose texts are marks, and split the rendering at the marks.

        Args:
            messages: The turns; a mark is a slot's number and name between two `mark`.
            tools: Tool definitions.
            prompt: Open the assistant's next turn.
            mark: A character.
            thinks: As for `render`.

        Returns:
            The skeleton. Similar chats share it, so it must not be changed.

        Raises:
            TemplateError: The template refuses the messages.
        """
        key = None
        if not tools and all(message.is_plain for message in messages):
            key = prompt, mark, thinks, tuple(messages)
            if key in self._skeletons:
                return self._skeletons[key]
        text = self.render([message.as_dict() for message in messages], tools, prompt, thinks)
        parts = re.split(rf"{mark}(\d+)([a-z]+){mark}", text)
        slots = [(int(index), name) for index, name in zip(parts[1::3], parts[2::3], strict=True)]
        if key is not None:
            if len(self._skeletons) >= _MOST_SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = text, parts[::3], slots
        return text, parts[::3], slots
