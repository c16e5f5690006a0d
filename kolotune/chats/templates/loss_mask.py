"""Where the loss falls: on every assistant turn and its end token, and on nothing else.

`AnswerLocator` finds the answers of a chat, each with the prompt that it is served behind (see `answer_search`);
`tokens.encoder` makes token ids and labels of them. Nothing is guessed from what a template looks like. The rendering
is compared with its skeleton (see `rendering`), so the position of every text is proven. What can't be proven in this
way is refused.

Example: in ``<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n`` the loss falls on
``Hello<|im_end|>``.

Where each prompt and its answer are the start of the whole rendering, a chat is trained in one piece, and its answers
are spans of it. Otherwise the answers are trained apart, each behind its own prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from ..chat import Chat
from .answer_search import AnswerSearch, InlineThoughtError, TrainedAnswer
from .rendering import Rendering, Span, check_shown, texts_of, with_separate_thoughts
from .reply_format import ReplyFormat, token_pattern
from .template import ChatTemplate


class ApartReason(Enum):
    """Why the answers of a chat are trained apart."""

    OPENING = "the template opens a reply with something that it does not write before finished answers"
    HISTORY = "the template writes earlier answers differently once later turns follow"
    BOUNDARY = "the last token of a prompt would merge with the answer"


@dataclass(frozen=True)
class MaskedChat:
    """A rendered chat and where the loss falls; positions count characters.

    Attributes:
        text: The whole rendering.
        spans: Start and end of each assistant turn, in order; its end token is inside. Empty if the answers are
            trained apart.
        empty_thoughts: The length of the empty thought at the start of each of these turns.
        given_weights: How much the loss on each of these turns counts; None if it counts in full everywhere.
    """

    text: str
    spans: tuple[Span, ...]
    empty_thoughts: tuple[int, ...]
    given_weights: tuple[float, ...] | None = field(default=None, kw_only=True)

    @property
    def weights(self) -> tuple[float, ...]:
        """How much the loss on each assistant turn counts; 0 where it is not trained on."""
        return self.given_weights if self.given_weights is not None else (1.0,) * len(self.spans)


@dataclass(frozen=True)
class LocatedChat(MaskedChat):
    """A masked chat that was rendered and compared with its skeleton.

    Attributes:
        slots: The spans of the chat's own texts; None if not all of them could be located.
        skeleton: The rendering with marks instead of the texts.
        apart: The answers that are trained apart; empty if the chat is trained in one piece.
        reason: Why they are.
        dropped_thoughts: The number of thoughts that the template leaves out once later turns follow.
    """

    slots: tuple[Span, ...] | None
    skeleton: str
    apart: tuple[TrainedAnswer, ...] = ()
    reason: ApartReason | None = None
    dropped_thoughts: int = 0


class AnswerLocator:
    """Finds the answers in chats that one template renders.

    Args:
        template: The chat template, with the date frozen.
        special: The texts of the tokenizer's special tokens.
    """

    def __init__(self, template: ChatTemplate, special: Collection[str]) -> None:
        self.template = template
        self.special_pattern = token_pattern(frozenset(special))
        self._special = frozenset(special)

    @cached_property
    def reply(self) -> ReplyFormat:
        """How the template opens and ends answers; see `ReplyFormat.of` for the errors."""
        return ReplyFormat.of(self.template, self._special)

    def locate(self, chat: Chat) -> LocatedChat:
        """Render a chat, of which at least one turn is the assistant's, and find its answers.

        Raises:
            TemplateError: The template refuses the chat, leaves out a part of it that the model should see or learn,
                does not end answers with a special token, or opens a reply differently when serving than in training.
        """
        try:
            return self._locate(chat)
        except InlineThoughtError:
            return self._locate(with_separate_thoughts(chat))

    def _locate(self, chat: Chat) -> LocatedChat:
        reply = self.reply
        rendering = Rendering(chat, self.template)
        skeleton = rendering.skeleton()
        check_shown(chat, rendering, skeleton)
        fitted = skeleton.fit(rendering.text)
        has_special_text = any(self.special_pattern.search(m.content + (m.reasoning or "")) for m in chat.messages)
        search = AnswerSearch(reply, rendering, skeleton, fitted, has_special_text)
        numbers = [index for index, message in enumerate(chat.messages) if message.role == "assistant"]
        answers = [search.find(index) for index in numbers]
        is_whole = _are_in_one_piece(answers, rendering.text)
        reason = None
        if not is_whole:
            as_written = all(answer.is_as_written for answer in answers)
            reason = ApartReason.HISTORY if as_written else ApartReason.OPENING
        dropped = sum(
            "reasoning" in texts_of(rendering.messages[index]) and (index, "reasoning") not in skeleton.slots
            for index in numbers
            if index + 1 < len(chat.messages)
        )
        return LocatedChat(
            rendering.text,
            tuple((len(one.prompt), len(one.prompt) + len(one.answer)) for one in answers) if is_whole else (),
            tuple(one.empty_thought for one in answers) if is_whole else (),
            None if fitted is None else tuple(fitted),
            skeleton.text,
            () if is_whole else tuple(answers),
            reason,
            dropped,
        )


def _are_in_one_piece(answers: Sequence[TrainedAnswer], text: str) -> bool:
    """Whether each prompt and its answer are the start of a text, one behind the other."""
    end = 0
    for answer in answers:
        if len(answer.prompt) < end or not text.startswith(answer.prompt + answer.answer):
            return False
        end = len(answer.prompt) + len(answer.answer)
    return True
