"""Find what a model is to write for one answer of a chat, and the prompt that the server puts before it.

The prompt is the chat up to the answer, rendered for generation. The answer is what the template writes behind that
once the answer is there. Some templates open a reply with something that they do not write before finished answers: a
thought. Then the answer is what the model has to write behind the opened thought.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from kolotune.foundation.errors import TemplateError

from ..chat import called_function
from .rendering import OTHER_TEMPLATE, FilledSkeleton, Rendering, Span, inline_reasoning, texts_of
from .reply_format import NEVER_STOPS, ReplyFormat
from .thoughts import (
    OpenedThought,
    closing_of_empty_thought,
    empty_thought,
    opened_thought,
    start_of_thought,
    without_empty_thought,
    writes_thought,
)

_NO_REASONING = "the chat template does not write reasoning"


class InlineThoughtError(Exception):
    """The template takes the thought in a content for a part of the answer, and writes an empty one before it."""


@dataclass(frozen=True)
class TrainedAnswer:
    """An answer, and the prompt that it is trained behind.

    Attributes:
        prompt: What the server puts before the answer.
        answer: What the model is to write, with the end token.
        empty_thought: The length of the empty thought at the start of the answer.
        is_as_written: The template writes the finished answer behind what it opens a reply with.
        texts: The spans of the chat's own texts in the answer; None if they are not known.
        skeleton: The rendering of the chat up to the answer, with marks instead of its texts.
        prompt_texts: The spans of the chat's own texts in the prompt; None if they are not known.
    """

    prompt: str
    answer: str
    empty_thought: int
    is_as_written: bool
    texts: tuple[Span, ...] | None
    skeleton: str
    prompt_texts: tuple[Span, ...] | None = None


@dataclass(frozen=True)
class _Turn:
    """The rendering in which an answer is searched: that of the chat up to it.

    Attributes:
        text: The rendering.
        skeleton: The same with marks.
        fitted: The spans of all slots of the skeleton; None if not all of them could be located.
        slots: The spans of the answer's texts, by name.
        is_last: Whether the chat ends with the answer.
    """

    text: str
    skeleton: FilledSkeleton
    fitted: list[Span] | None
    slots: Mapping[str, Span]
    is_last: bool

    @property
    def first(self) -> int:
        """Where the first text of the answer starts; the white space before a thought may be the prompt's."""
        starts = {name: start for name, (start, _) in self.slots.items()}
        if "reasoning" in starts:
            start, end = self.slots["reasoning"]
            starts["reasoning"] = end - len(self.text[start:end].lstrip())
        return min(starts.values())

    def opens_with(self, opening: str, start: int) -> bool:
        """Whether the answer is behind this opening, which starts here, or behind all of it but a thought."""
        head = _without_thought(opening)
        return self.text.startswith(head, start) and start + len(head) <= self.first


@dataclass
class AnswerSearch:
    """The search for the answers of one rendered chat.

    Attributes:
        reply: How the template opens and ends replies.
        rendering: The chat, rendered.
        skeleton: The same with marks.
        fitted: The spans of all slots of the skeleton; None if not all of them could be located.
        locates_prompts: Whether the chat's own texts in the prompts are needed, too.
    """

    reply: ReplyFormat
    rendering: Rendering
    skeleton: FilledSkeleton
    fitted: list[Span] | None
    locates_prompts: bool

    def find(self, index: int) -> TrainedAnswer:
        """Find the answer that is the message of this number.

        Raises:
            TemplateError: It is not certain what the model has to write, or it would not contain the chat's texts.
        """
        turn = self._turn(index)
        end = self._end(index, turn)
        message = self.rendering.messages[index]
        prompt = self.rendering.render(index, prompt=True) if index else None
        has_shown = turn.slots.keys() >= texts_of(message).keys()
        if prompt is not None and has_shown and turn.text.startswith(prompt) and len(prompt) <= turn.first:
            answer = self._as_written(index, turn, prompt, (len(prompt), end))
        else:
            answer = self._behind_opening(index, turn, prompt, end)
        for call in message.tool_calls:
            name = str(called_function(call).get("name", ""))
            if name not in answer.answer:
                raise TemplateError(f"the chat template leaves out the call of {name}")
        if self.locates_prompts:
            spans = self.rendering.skeleton(upto=index, prompt=True).fit(answer.prompt) if index else []
            answer = dataclasses.replace(answer, prompt_texts=None if spans is None else tuple(spans))
        return answer

    def _turn(self, index: int) -> _Turn:
        """Render the chat up to an answer, and find the texts of the answer.

        Of a name that occurs again later, the first span counts.
        """
        rendering = self.rendering
        is_last = index + 1 == len(rendering.messages)
        text, skeleton, fitted = rendering.text, self.skeleton, self.fitted
        if not is_last:
            try:
                text = rendering.render(index + 1)
                skeleton = rendering.skeleton(upto=index + 1)
                fitted = skeleton.fit(text)
            except TemplateError:
                is_last = False  # the template writes this answer only with what follows
            else:
                is_last = True
        marked, located = skeleton, fitted
        if located is None:
            # Some other message changes what the template does: mark only this one.
            marked = rendering.skeleton({index}, index + 1 if is_last else None)
            located = marked.fit(text)
        if located is None:
            raise TemplateError("the template changes the text of an answer, so it is unclear what to train on")
        slots: dict[str, Span] = {}
        for (message, name), span in zip(marked.slots, located, strict=True):
            if message == index:
                if name == "content" and name in slots:
                    raise TemplateError("the template writes an answer more than once")
                slots.setdefault(name, span)
        if not slots:
            raise TemplateError("an answer has no text that could be trained on")
        if texts_of(rendering.messages[index]).keys() - slots.keys() - {"reasoning"}:
            raise TemplateError("the template leaves out an answer that nothing follows")
        return _Turn(text, skeleton, fitted, slots, is_last)

    def _as_written(self, index: int, turn: _Turn, prompt: str, span: Span) -> TrainedAnswer:
        """Return an answer that the template writes behind what it opens a reply with."""
        start, end = span
        message = self.rendering.messages[index]
        before = turn.text[start : turn.first]
        if "reasoning" in turn.slots and not message.reasoning:
            tail = self.rendering.skeleton(upto=index, prompt=True).pieces[-1] if index else ""
            if writes_thought(before) or writes_thought(tail):
                raise InlineThoughtError
        has_thought = "reasoning" in turn.slots or inline_reasoning(message) is not None
        texts = tuple((max(a, start) - start, b - start) for a, b in sorted(turn.slots.values()))
        empty = 0 if has_thought else empty_thought(before)
        return TrainedAnswer(prompt, turn.text[start:end], empty, True, texts, turn.skeleton.text)

    def _behind_opening(self, index: int, turn: _Turn, prompt: str | None, end: int) -> TrainedAnswer:
        """Find an answer whose prompt is not the start of the finished chat."""
        opening, start = self._opening(index, turn, prompt)
        thought = opened_thought(opening)
        if thought is None:
            begin = start + len(opening)
            if prompt is None:
                prompt = turn.text[:begin]
            if "reasoning" in texts_of(self.rendering.messages[index]).keys() - turn.slots.keys():
                return self._with_thought(index, turn, prompt, opening, end)
            return self._as_written(index, turn, prompt, (begin, end))
        if prompt is None:
            prompt = turn.text[:start] + opening
        return self._behind_thought(index, turn, prompt, (start + thought.start, end), thought)

    def _with_thought(self, index: int, turn: _Turn, prompt: str, opening: str, end: int) -> TrainedAnswer:
        """Return an answer with its thought, which the template writes only if the answer calls a tool."""
        written = self.rendering.around_reasoning(index, calls_tool=True)
        opened = start_of_thought(written[0]) if written is not None else None
        if written is None or opened is None or not written[0].endswith(opening + opened):
            raise TemplateError(_NO_REASONING + OTHER_TEMPLATE)
        closing = written[1][: empty_thought(written[1])]
        if not closing:
            raise TemplateError(_NO_REASONING + OTHER_TEMPLATE)
        message = self.rendering.messages[index]
        reasoning = texts_of(message)["reasoning"].strip()
        before = opened + reasoning + closing
        body = turn.first
        texts = [(len(opened), len(opened) + len(reasoning))]
        texts += [(a - body + len(before), b - body + len(before)) for a, b in sorted(turn.slots.values())]
        answer = before + turn.text[body:end]
        return TrainedAnswer(prompt, answer, 0, True, tuple(texts), turn.skeleton.text)

    def _behind_thought(
        self, index: int, turn: _Turn, prompt: str, span: Span, thought: OpenedThought
    ) -> TrainedAnswer:
        """Return what the model has to write where the prompt opens a thought and the finished answer has none.

        Args:
            index: The number of the message.
            turn: The chat up to the answer.
            prompt: The prompt.
            span: Where the template would write the thought, and where the answer ends.
            thought: The thought that the prompt opens.
        """
        start, end = span
        message = self.rendering.messages[index]
        reasoning = texts_of(message).get("reasoning", "").strip()
        body = min((at for name, (at, _) in turn.slots.items() if name != "reasoning"), default=end)
        instead = turn.text[start : turn.first]  # what the template writes instead of the thought
        if thought.is_closed:
            if reasoning:
                raise TemplateError(
                    f"{_NO_REASONING}: its prompts close the thought that they open",
                    "If the template has a switch for thinking, turn it on with --template-switch, such as "
                    "enable_thinking; or leave the thoughts out of the chats.",
                )
            before = without_empty_thought(instead)
            if before != instead:
                before = before.removeprefix(thought.behind)
        else:
            before = self._closing(index, thought, None if "reasoning" in turn.slots else instead)
        is_inline = inline_reasoning(message) is not None
        if is_inline and before.endswith("\n"):
            # The text that followed the thought in the content; the line breaks between them are there already.
            while turn.text.startswith("\n", body):
                body += 1
        answer = reasoning + before + turn.text[body:end]
        shift = len(reasoning) + len(before) - body
        texts = [(0, len(reasoning))] if reasoning else []
        texts += [
            (max(a, body) + shift, b + shift) for name, (a, b) in sorted(turn.slots.items()) if name != "reasoning"
        ]
        empty = 0 if reasoning or is_inline or thought.is_closed else empty_thought(before)
        return TrainedAnswer(prompt, answer, empty, False, tuple(sorted(texts)), turn.skeleton.text)

    def _closing(self, index: int, thought: OpenedThought, instead: str | None) -> str:
        """Return what the model writes from the end of a thought to the first text of its answer.

        As the template writes it behind reasoning; else as it writes an empty thought; else as such models do.

        Args:
            index: The number of the message.
            thought: The thought that the prompt opens.
            instead: What the template writes instead of the thought; None if it writes one.
        """
        written = self.rendering.around_reasoning(index)
        if written is not None:
            before, behind = written
            if opened_thought(before) is not None and closing_of_empty_thought(behind) is not None:
                return behind
        closing = closing_of_empty_thought(instead) if instead is not None else None
        if instead is not None and closing is not None:
            return closing + instead[empty_thought(instead) :]
        if instead is None or thought.usual_closing is None:
            raise _differs(thought.tag)
        return thought.usual_closing + instead

    def _opening(self, index: int, turn: _Turn, prompt: str | None) -> tuple[str, int]:
        """Return what the template opens the reply with, and where that starts in the rendering of the answer.

        The template may write earlier turns differently once later ones follow. Then what it writes between the last
        text and the reply, or at least the opening of a reply, must be there all the same.
        """
        behind, is_proven = 0, False
        if prompt is not None:
            tail = self.rendering.skeleton(upto=index, prompt=True)
            opening = tail.pieces[-1]
            before = prompt[: len(prompt) - len(opening)]
            if prompt.endswith(opening):
                if turn.text.startswith(before) and turn.opens_with(opening, len(before)):
                    return opening, len(before)
                earlier = [
                    (slot, end)
                    for slot, (_, end) in zip(turn.skeleton.slots, turn.fitted or (), strict=False)
                    if slot[0] < index and end <= turn.first
                ]
                if earlier and tail.slots and earlier[-1][0] == tail.slots[-1]:
                    behind, is_proven = earlier[-1][1], True
                    if turn.opens_with(opening, behind):
                        return opening, behind
        if not is_proven and not self._is_opening_unique():
            raise TemplateError("this template does not show where an answer starts")
        opening = self.reply.opening
        head = _without_thought(opening)
        start = turn.text.rfind(head, behind, turn.first)
        if not head or start < 0 or self.reply.end_token in turn.text[start + len(head) : turn.first]:
            shared = next(n for n in range(len(opening), -1, -1) if turn.text.endswith(opening[:n], behind, turn.first))
            raise _differs(opening[shared:])
        return opening, start

    def _is_opening_unique(self) -> bool:
        """Whether the opening of a reply occurs in no message of the chat."""
        opening = self.reply.opening
        return bool(opening) and _inside_json(opening) not in _inside_json(self.rendering.message_dicts())

    def _end(self, index: int, turn: _Turn) -> int:
        """Return the position behind the special token that ends the turn."""
        text, slots = turn.text, turn.slots
        right = max(end for _, end in slots.values())
        if "call" not in slots and "content" in slots:
            match = self.reply.end_at(text[right:])
            if match is None:
                raise TemplateError(NEVER_STOPS)
            # A token that ends an answer only in the middle of a chat must not stop the model: it is not learned.
            return right + match.end() if turn.is_last or match[1] == self.reply.end_token else right
        # Behind the name in a call, or behind reasoning without an answer, the template writes more. The turn is over
        # where the chat up to here is, or at the first end token, if that is before the next message.
        if turn.is_last:
            end = self.reply.end_of_turn(text)
            if end is not None and end > right:
                return end
        end = text.find(self.reply.end_token, right)
        later = [span[0] for slot, span in zip(turn.skeleton.slots, turn.fitted or (), strict=False) if slot[0] > index]
        if end < 0 or turn.fitted is None or end > min(later, default=end):
            raise TemplateError("this template does not show where a turn with tool calls ends")
        return end + len(self.reply.end_token)


def _without_thought(opening: str) -> str:
    thought = opened_thought(opening)
    return opening if thought is None else opening[: thought.start]


def _differs(opening: str) -> TemplateError:
    return TemplateError(
        f"the template opens a reply with {opening!r} when the model generates, but does not write that in front of "
        "a finished answer: training and serving would differ"
    )


def _inside_json(value: object) -> str:
    """Return a value as JSON without its first and last character, to search for texts in structures."""
    return json.dumps(value, ensure_ascii=False)[1:-1]
