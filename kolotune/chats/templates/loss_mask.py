"""Where the loss falls: on every assistant turn and its end token, and on nothing else.

`AnswerLocator` finds the answers as character spans of the rendered chat; `tokens.encoder` makes token ids and labels
of them. Nothing is guessed from what a template looks like. The rendering is compared with its skeleton (see
`rendering`), so the position of every text is proven. An answer starts where the prompt ends that the model is served
with; it ends behind the token that ends its turn. What can't be proven in this way is refused.

Example: in ``<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n`` the loss falls on
``Hello<|im_end|>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from os.path import commonprefix

from kolotune.foundation.errors import TemplateError

from ..chat import Chat, called_function
from .rendering import FilledSkeleton, Rendering, Span, check_shown
from .template import ChatTemplate

_NEVER_STOPS = "the template ends an answer with no special token: the model would never learn to stop"


@dataclass(frozen=True)
class MaskedChat:
    """A rendered chat and where the loss falls; positions count characters.

    Attributes:
        text: The whole rendering.
        spans: Start and end of each assistant turn, in order; its end token is inside.
    """

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class LocatedChat(MaskedChat):
    """A masked chat that was rendered and compared with its skeleton.

    Attributes:
        slots: The spans of the chat's own texts; None if not all of them could be located.
        skeleton: The rendering with marks instead of the texts.
    """

    slots: tuple[Span, ...] | None
    skeleton: str


@dataclass(frozen=True)
class ReplyFormat:
    """How a template opens and ends a reply, as seen on a chat of two turns.

    Attributes:
        end_token: The special token that ends an answer.
        opening: What the template writes to open a reply when the model is to generate; may be empty.
    """

    end_token: str
    opening: str


class AnswerLocator:
    """Finds the answers in chats that one template renders.

    Args:
        template: The chat template, with the date frozen.
        special: The texts of the tokenizer's special tokens.
    """

    def __init__(self, template: ChatTemplate, special: Collection[str]) -> None:
        self.template = template
        self.special_pattern = token_pattern(frozenset(special))
        token = self.special_pattern.pattern
        eos = str(template.special_tokens.get("eos_token", ""))
        self._one_token = re.compile(rf"\s*({token})")
        # Several special tokens up to the end of sequence (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`): generating stops
        # at that one only.
        self._up_to_eos = re.compile(rf"\s*(?:{token})*?({re.escape(eos)})") if eos in special else None

    def locate(self, chat: Chat) -> LocatedChat:
        """Render a chat, of which at least one turn is the assistant's, and find its answers.

        Raises:
            TemplateError: The template refuses the chat, leaves out a part of it that the model should see or learn,
                does not end answers with a special token, or opens a reply differently when serving than in training.
        """
        reply = self.reply
        rendering = Rendering(chat, self.template)
        skeleton = rendering.skeleton()
        check_shown(chat, rendering, skeleton)
        search = _AnswerSearch(self, reply, rendering, skeleton, skeleton.fit(rendering.text))
        return LocatedChat(
            rendering.text, search.spans(), None if search.fitted is None else tuple(search.fitted), skeleton.text
        )

    @cached_property
    def reply(self) -> ReplyFormat:
        """How the template opens and ends answers.

        Raises:
            TemplateError: The template can't render a question and an answer, or ends an answer with no special
                token, so that the model would never learn to stop.
        """
        question, answer = "\ue0010\ue001", "\ue0011\ue001"
        first = [{"role": "user", "content": question}]
        both = [*first, {"role": "assistant", "content": answer}]
        tools = None
        try:
            whole = self.template.render(both)
        except TemplateError:
            # The second template of some models is only for chats with tools.
            tools = [{"type": "function", "function": {"name": "a", "description": "a", "parameters": {}}}]
            whole = self.template.render(both, tools)
        prompt = self.template.render(first, tools, add_generation_prompt=True)
        plain = self.template.render(first, tools)
        if whole.count(answer) != 1 or question not in whole:
            raise TemplateError("the chat template does not write a question and its answer once each")
        before, behind = whole.split(answer)
        end = self.end_token_at(behind)
        if end is None:
            raise TemplateError(_NEVER_STOPS)
        if self.special_pattern.sub("", behind).strip():
            raise TemplateError(f"the chat template writes more of a turn behind its answer: {behind!r}")
        cut = len(commonprefix([prompt, plain]))  # noqa: RUF071 - of texts, not of paths
        # Not inside a token: `<|end|>` and `<|endoftext|>` share a prefix.
        cut = next((m.start() for m in self.special_pattern.finditer(prompt) if m.start() < cut < m.end()), cut)
        if cut == len(prompt) and not before.startswith(prompt):
            raise TemplateError("the template opens replies differently than it writes finished answers")
        return ReplyFormat(end[1], prompt[cut:])

    def end_token_at(self, text: str) -> re.Match[str] | None:
        """Match the special token that a text starts with, after white space, or the end of sequence that follows."""
        return (self._up_to_eos.match(text) if self._up_to_eos else None) or self._one_token.match(text)

    def end_of_turn(self, text: str) -> int | None:
        """Return where the last turn of a text ends; an end-of-text token may follow the end of the turn."""
        end: int | None = None
        limit = len(text)
        for match in reversed(list(self.special_pattern.finditer(text))):
            if text[match.end() : limit].strip():
                break
            if match[0] == self.reply.end_token:
                return match.end()
            end = match.end() if end is None else end
            limit = match.start()
        return end


def end_token(template: ChatTemplate, special: Collection[str]) -> str:
    """Return the special token with which a template ends an answer; see `AnswerLocator.reply` for the errors."""
    return AnswerLocator(template, special).reply.end_token


@lru_cache(maxsize=32)
def token_pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    """Return an expression that matches any of these tokens, the longest first, as the tokenizer does."""
    texts = sorted((text for text in tokens if text), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


@dataclass
class _AnswerSearch:
    """The search for the answers of one rendered chat."""

    locator: AnswerLocator
    reply: ReplyFormat
    rendering: Rendering
    skeleton: FilledSkeleton
    fitted: list[Span] | None

    def spans(self) -> tuple[Span, ...]:
        spans: list[Span] = []
        for index, message in enumerate(self.rendering.messages):
            if message.role == "assistant":
                spans.append(self._span(index, spans[-1][1] if spans else 0))
        return tuple(spans)

    def _span(self, index: int, behind: int) -> Span:
        slots = self._slots(index)
        if not slots:
            raise TemplateError("an answer has no text that could be trained on")
        start = self._start(index, behind, min(start for start, _ in slots.values()))
        end = self._end(index, slots)
        if not behind <= start < end:
            raise TemplateError("the template writes the turns in a different order than the chat has them")
        for call in self.rendering.messages[index].tool_calls:
            name = str(called_function(call).get("name", ""))
            if name not in self.rendering.text[start:end]:
                raise TemplateError(f"the chat template leaves out the call of {name}")
        return start, end

    def _slots(self, index: int) -> dict[str, Span]:
        """Return the spans of the texts of one message; of a name that occurs again later, the first span."""
        skeleton, fitted = self.skeleton, self.fitted
        if fitted is None:
            # Some other message changes what the template does: mark only this one.
            skeleton = self.rendering.skeleton({index})
            fitted = skeleton.fit(self.rendering.text)
        if fitted is None:
            raise TemplateError("the template changes the text of an answer, so it is unclear what to train on")
        spans: dict[str, Span] = {}
        for (message, name), span in zip(skeleton.slots, fitted, strict=True):
            if message == index:
                if name == "content" and name in spans:
                    raise TemplateError("the template writes an answer more than once")
                spans.setdefault(name, span)
        return spans

    def _start(self, index: int, behind: int, left: int) -> int:
        """Return where the prompt ends that the model is served with.

        Args:
            index: The number of the assistant's message.
            behind: Where the assistant's previous turn ends.
            left: Where the first text of this message starts.
        """
        text, opening = self.rendering.text, self.reply.opening
        is_proven = False
        if index:
            prompt = self.rendering.render(self.rendering.messages[:index], prompt=True)
            if text.startswith(prompt) and len(prompt) >= behind:
                return len(prompt)
            # The template writes earlier turns differently once later ones follow. What it writes between the last
            # message and the reply, or at least the opening of a reply, must be there all the same.
            tail = self.rendering.skeleton(upto=index, prompt=True)
            for slot, (_, end) in reversed(list(zip(self.skeleton.slots, self.fitted or (), strict=False))):
                if tail.slots and slot == tail.slots[-1] and slot[0] == index - 1 and end <= left:
                    if text.startswith(tail.pieces[-1], end):
                        return end + len(tail.pieces[-1])
                    behind, is_proven = end, True
                    break
        if not is_proven and not self._is_opening_unique():
            raise TemplateError("this template does not show where an answer starts")
        start = text.rfind(opening, behind, left)
        if not opening or start < 0 or self.reply.end_token in text[start + len(opening) : left]:
            shared = next(n for n in range(len(opening), -1, -1) if text.endswith(opening[:n], behind, left))
            raise TemplateError(
                f"the template opens a reply with {opening[shared:]!r} when the model generates, but does "
                "not write that in front of a finished answer: training and serving would differ"
            )
        return start + len(opening)

    def _is_opening_unique(self) -> bool:
        """Whether the opening of a reply occurs in no message of the chat."""
        opening = self.reply.opening
        return bool(opening) and _inside_json(opening) not in _inside_json(self.rendering.message_dicts())

    def _end(self, index: int, slots: dict[str, Span]) -> int:
        """Return the position behind the special token that ends the turn."""
        text, messages = self.rendering.text, self.rendering.messages
        right = max(end for _, end in slots.values())
        if "call" not in slots and "content" in slots:
            match = self.locator.end_token_at(text[right:])
            if match is None:
                raise TemplateError(_NEVER_STOPS)
            # gpt-oss ends all but the last answer with a token that must not stop the model: it is not learned.
            return right + match.end() if match[1] == self.reply.end_token else right
        # Behind the name in a call, or behind reasoning without an answer, the template writes more. The turn is over
        # where the chat up to here is, or at the first end token, if that is before the next message.
        upto = text if index + 1 == len(messages) else self.rendering.render(messages[: index + 1])
        if text.startswith(upto):
            end = self.locator.end_of_turn(upto)
            if end is not None and end > right:
                return end
        end = text.find(self.reply.end_token, right)
        later = [span[0] for slot, span in zip(self.skeleton.slots, self.fitted or (), strict=False) if slot[0] > index]
        if end < 0 or self.fitted is None or end > min(later, default=end):
            raise TemplateError("this template does not show where a turn with tool calls ends")
        return end + len(self.reply.end_token)


def _inside_json(value: object) -> str:
    """Return a value as JSON without its first and last character, to search for texts in structures."""
    return json.dumps(value, ensure_ascii=False)[1:-1]
