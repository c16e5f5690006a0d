"""Where the loss falls: on every assistant turn and its end token, and on nothing else.

`locate` finds the answers as character spans of the rendered chat; `encoding` makes token ids and labels of
them. Nothing is guessed from a template's look. The chat is rendered a second time with marks in place of
its contents (the skeleton): the text between the marks is what the template wrote, and the real rendering has
to be that text with the contents in between. An answer starts where the prompt ends that the model is served
with; it ends behind the token that ends its turn. What can't be proven in this way is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kolotune.foundation.errors import TemplateError

from ..chat import Chat
from .rendering import Rendering, Skeleton, Span, check_shown
from .template import ChatTemplate

_NEVER_STOPS = "the template ends an answer with no special token: the model would never learn to stop"


@dataclass(frozen=True)
class Located:
    """A rendered chat and what is what in it; all positions count characters of `text`.

    Attributes:
        text: the whole rendering.
        spans: for each assistant turn, in order, where it starts and ends (its end token is inside).
        turn_starts: where each exchange starts: 0, then behind the answer before each further user turn.
        slots: where the chat's own texts stand; None where that could not be told for all of them.
        skeleton: the rendering with marks in place of the contents.
    """

    text: str
    spans: tuple[Span, ...]
    turn_starts: tuple[int, ...]
    slots: tuple[Span, ...] | None
    skeleton: str


@dataclass(frozen=True)
class Probe:
    """What a template does, seen on a chat of two turns.

    Attributes:
        end_token: the special token that ends an answer.
        opening: what the template writes to open a reply when the model is to generate; may be empty.
    """

    end_token: str
    opening: str


@lru_cache(maxsize=32)
def probe(template: ChatTemplate, special: frozenset[str]) -> Probe:
    """How a template opens and ends answers.

    Args:
        template: the chat template.
        special: the texts of the tokenizer's special tokens.

    Returns:
        What was seen.

    Raises:
        TemplateError: the template can't render a question and an answer, or ends an answer with no special
            token, so that the model would never learn to stop.
    """
    question = [{"role": "user", "content": "\ue0010\ue001"}]
    answer = "\ue0011\ue001"
    finished = [*question, {"role": "assistant", "content": answer}]
    try:
        tools = None
        whole = template.render(finished)
    except TemplateError:
        # The second template of some models is for chats with tools only.
        tools = [{"type": "function", "function": {"name": "a", "description": "a", "parameters": {}}}]
        whole = template.render(finished, tools)
    prompt = template.render(question, tools, add_generation_prompt=True)
    plain = template.render(question, tools)
    if whole.count(answer) != 1 or question[0]["content"] not in whole:
        raise TemplateError("the chat template does not write a question and its answer once each")
    before, behind = whole.split(answer)
    end = _end_token(behind, special, template)
    if end is None:
        raise TemplateError(_NEVER_STOPS)
    if pattern_of(special).sub("", behind).strip():
        raise TemplateError(f"the chat template writes more of a turn behind its answer: {behind!r}")
    cut = _common(prompt, plain)
    # Not inside a token: `<|end|>` and `<|endoftext|>` begin alike.
    cut = next((m.start() for m in pattern_of(special).finditer(prompt) if m.start() < cut < m.end()), cut)
    if cut == len(prompt) and not before.startswith(prompt):
        raise TemplateError("the template opens replies otherwise than it writes finished answers")
    return Probe(end[1], prompt[cut:])


def end_token(template: ChatTemplate, special: Collection[str]) -> str:
    """The special token with which a template ends an answer; see `probe` for the errors."""
    return probe(template, frozenset(special)).end_token


@lru_cache(maxsize=32)
def pattern_of(special: frozenset[str]) -> re.Pattern[str]:
    """Matches special tokens, the longest first, as the tokenizer does."""
    texts = sorted((text for text in special if text), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _end_token(text: str, special: frozenset[str], template: ChatTemplate) -> re.Match[str] | None:
    """The special token with which a text begins, white space aside; or the end of sequence, where it is in
    the same row of tokens (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`): generating only stops there."""
    row, token = _end_patterns(special, str(template.special_tokens.get("eos_token", "")))
    return (row.match(text) if row else None) or token.match(text)


@lru_cache(maxsize=32)
def _end_patterns(special: frozenset[str], eos: str) -> tuple[re.Pattern[str] | None, re.Pattern[str]]:
    """Matches a row of special tokens up to the end of sequence, where that is one; and a single special token."""
    token = pattern_of(special).pattern
    row = re.compile(rf"\s*(?:{token})*?({re.escape(eos)})") if eos in special else None
    return row, re.compile(rf"\s*({token})")


def _json(value: Any) -> str:
    """The inside of a value as JSON, to search texts in structures."""
    return json.dumps(value, ensure_ascii=False)[1:-1]


def _common(one: str, other: str) -> int:
    """The length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def locate(chat: Chat, template: ChatTemplate, special: Collection[str]) -> Located:
    """Render a chat and find its answers.

    Args:
        chat: the chat; at least one turn of it is the assistant's.
        template: the base model's template, with the date frozen.
        special: the texts of the tokenizer's special tokens.

    Returns:
        The text and the answers' spans, which don't overlap and are in order.

    Raises:
        TemplateError: the template refuses the chat, leaves out a part of it that the model should see or
            learn, does not end answers with a special token, or opens a reply otherwise when serving than
            in training.
    """
    special = frozenset(special)
    seen = probe(template, special)
    rendering = Rendering(chat, template)
    skeleton = rendering.skeleton()
    check_shown(chat, rendering, skeleton)
    return _Locator(rendering, seen, special, skeleton, skeleton.fit(rendering.text)).located()


@dataclass
class _Locator:
    """Finds the spans of one rendered chat."""

    rendering: Rendering
    seen: Probe
    special: frozenset[str]
    skeleton: Skeleton
    fitted: list[Span] | None

    def located(self) -> Located:
        text = self.rendering.text
        spans: list[Span] = []
        starts, answered = [0], False
        for index, message in enumerate(self.rendering.messages):
            if message["role"] == "assistant":
                spans.append(self._span(index, spans[-1][1] if spans else 0))
                answered = True
            elif message["role"] == "user" and answered:
                rest = text[spans[-1][1] :]
                starts.append(len(text) - len(rest.lstrip()))
                answered = False
        slots = None if self.fitted is None else tuple(self.fitted)
        return Located(text, tuple(spans), tuple(starts), slots, self.skeleton.text)

    def _span(self, index: int, behind: int) -> Span:
        slots = self._slots(index)
        if not slots:
            raise TemplateError("an answer has no text that could be trained on")
        start = self._start(index, behind, min(start for start, _ in slots.values()))
        end = self._end(index, slots)
        if not behind <= start < end:
            raise TemplateError("the template writes the turns in another order than the chat has them")
        for call in self.rendering.messages[index].get("tool_calls", ()):
            name = str(call.get("function", call).get("name", ""))
            if name not in self.rendering.text[start:end]:
                raise TemplateError(f"this base model's template leaves out the call of {name}")
        return start, end

    def _slots(self, index: int) -> dict[str, Span]:
        """Where the texts of one message stand; of a name that is written again later, the first place."""
        skeleton, fitted = self.skeleton, self.fitted
        if fitted is None:
            # Some other message changes what the template does: let only this one be marked.
            skeleton = self.rendering.skeleton({index})
            fitted = skeleton.fit(self.rendering.text)
        if fitted is None:
            raise TemplateError("the template changes the text of an answer: what to train on can't be told")
        found: dict[str, Span] = {}
        for (at, name), span in zip(skeleton.slots, fitted, strict=True):
            if at == index:
                if name == "content" and name in found:
                    raise TemplateError("the template writes an answer more than once")
                found.setdefault(name, span)
        return found

    def _start(self, index: int, behind: int, left: int) -> int:
        """Where the model goes on from the prompt that it is served with; `left` is where the turn's own
        texts begin, `behind` where the turn before ends."""
        text, opening = self.rendering.text, self.seen.opening
        if index:
            prompt = self.rendering.render(self.rendering.messages[:index], prompt=True)
            if text.startswith(prompt) and len(prompt) >= behind:
                return len(prompt)
            alone = self._opening_stands_alone()
            # The template writes earlier turns otherwise once later ones follow. What it writes between the
            # last message and the reply, or at least the opening of a reply, has to be there all the same.
            tail = self.rendering.skeleton(upto=index, prompt=True)
            for slot, (_, end) in reversed(list(zip(self.skeleton.slots, self.fitted or (), strict=False))):
                if tail.slots and slot == tail.slots[-1] and slot[0] == index - 1 and end <= left:
                    if text.startswith(tail.pieces[-1], end):
                        return end + len(tail.pieces[-1])
                    behind, alone = end, True
                    break
        else:
            alone = self._opening_stands_alone()
        if not alone:
            raise TemplateError("where an answer starts in this template can't be told")
        at = text.rfind(opening, behind, left)
        if not opening or at < 0 or self.seen.end_token in text[at + len(opening) : left]:
            shared = next(n for n in range(len(opening), -1, -1) if text.endswith(opening[:n], behind, left))
            raise TemplateError(
                f"the template opens a reply with {opening[shared:]!r} when the model generates, but does "
                "not write that in front of a finished answer: training and serving would differ"
            )
        return at + len(opening)

    def _opening_stands_alone(self) -> bool:
        opening = self.seen.opening
        return bool(opening) and _json(opening) not in _json(self.rendering.messages)

    def _end(self, index: int, slots: dict[str, Span]) -> int:
        """Behind the special token that ends the turn."""
        text, messages = self.rendering.text, self.rendering.messages
        right = max(end for _, end in slots.values())
        if "call" not in slots and "content" in slots:
            match = _end_token(text[right:], self.special, self.rendering.template)
            if match is None:
                raise TemplateError(_NEVER_STOPS)
            # gpt-oss ends all but the last answer with a token that must not stop the model: not learned.
            return right + match.end() if match[1] == self.seen.end_token else right
        # Behind the name in a call, or behind thinking without an answer, the template writes more. The turn
        # is over where the chat up to here is, or at the first end token, if that is before the next message.
        upto = text if index + 1 == len(messages) else self.rendering.render(messages[: index + 1])
        if text.startswith(upto):
            end = _closing(upto, self.special, self.seen.end_token)
            if end is not None and end > right:
                return end
        at = text.find(self.seen.end_token, right)
        later = [span[0] for slot, span in zip(self.skeleton.slots, self.fitted or (), strict=False) if slot[0] > index]
        if at < 0 or self.fitted is None or at > min(later, default=at):
            raise TemplateError("where a turn with tool calls ends in this template can't be told")
        return at + len(self.seen.end_token)


def _closing(text: str, special: frozenset[str], end_token: str) -> int | None:
    """Where the turn that a text closes with ends: an end-of-text token may follow the end of the turn."""
    end: int | None = None
    limit = len(text)
    for match in reversed(list(pattern_of(special).finditer(text))):
        if text[match.end() : limit].strip():
            break
        if match[0] == end_token:
            return match.end()
        end = match.end() if end is None else end
        limit = match.start()
    return end
