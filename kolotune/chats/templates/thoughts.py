"""Thoughts: how prompts open them, and how a model closes them before it answers.

Example: R1's prompts end with ``<think>\\n``. The model writes its thought, ``\\n</think>\\n\\n`` and the answer. An
answer without a thought is behind an empty one: ``\\n</think>\\n\\n`` and the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAGS = {
    "<think>": "</think>",
    "<|channel>thought": "<channel|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<mm:think>": "</mm:think>",
}
"""How models mark their thoughts: what opens one, and what closes it."""
_CLOSINGS = tuple(_TAGS.values())
_WITHOUT_EXAMPLE = "<think>"
_EMPTY_ONES = (
    rf"(?:{re.escape(tag)}\s*)?(?P<closing{number}>{re.escape(closing)})"
    for number, (tag, closing) in enumerate(_TAGS.items())
)
_EMPTY = re.compile(rf"\s*(?:{'|'.join(_EMPTY_ONES)})\s*")


@dataclass(frozen=True)
class OpenedThought:
    """A thought that a prompt opens.

    Attributes:
        tag: What opens it.
        start: Where the tag starts in the opening of the reply.
        is_closed: The prompt closes the thought, too: the model is to answer without one.
        has_own_line: A line break follows the tag.
        behind: The white space behind the end of a closed thought.
    """

    tag: str
    start: int
    is_closed: bool
    has_own_line: bool
    behind: str

    @property
    def usual_closing(self) -> str | None:
        """How models with this tag close a thought; None if that is only known from templates."""
        if self.tag != _WITHOUT_EXAMPLE:
            return None
        return f"\n{_TAGS[self.tag]}\n\n" if self.has_own_line else _TAGS[self.tag]


def opened_thought(opening: str) -> OpenedThought | None:
    """Return the thought at the end of what a template opens a reply with; None if it opens none."""
    tag = max(_TAGS, key=opening.rfind)
    start = opening.rfind(tag)
    if start < 0:
        # DeepSeek V4 closes a thought that it has not opened.
        end = opening.rstrip()
        return next(
            (
                OpenedThought(tag, len(end) - len(closing), True, False, opening[len(end) :])
                for tag, closing in _TAGS.items()
                if end.endswith(closing)
            ),
            None,
        )
    inside, closing, behind = opening[start + len(tag) :].partition(_TAGS[tag])
    if inside.strip() or behind.strip():
        return None
    return OpenedThought(tag, start, bool(closing), "\n" in inside, behind)


def empty_thought(text: str) -> int:
    """Return the length of the empty thought at the start of a text, or of the end of one; 0 if there is none."""
    match = _EMPTY.match(text)
    return match.end() if match else 0


def closing_of_empty_thought(text: str) -> str | None:
    """Return the empty thought at the start of a text without what opens it; None if there is none."""
    match = _EMPTY.match(text)
    return match[0][match.start(match.lastgroup or 0) - match.start() :] if match else None


def without_empty_thought(text: str) -> str:
    """Return a text without the empty thought, or the end of one, that it starts with."""
    match = _EMPTY.match(text)
    return text[match.end(match.lastgroup or 0) :] if match else text


def start_of_thought(text: str) -> str | None:
    """Return what opens the thought at the end of a text: its tag and the white space behind that; None if none is."""
    thought = opened_thought(text)
    return None if thought is None or thought.is_closed else text[thought.start :]


def writes_thought(text: str) -> bool:
    """Whether a text contains the end of a thought."""
    return any([closing in text for closing in _CLOSINGS])
