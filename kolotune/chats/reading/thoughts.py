"""Thoughts that a turn has twice: under a key, and in its content. Each is learnt once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NoReturn

from .content_parts import Content
from .faults import FaultKind, fail

_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_SPACES = re.compile(r"\s+")


def add_thoughts(content: Content, given: list[str]) -> None:
    """Add the thoughts that a turn has under keys to those of its content, each once.

    Raises:
        RecordError: The content has another thought than the keys.
    """
    if not content.thoughts:
        content.thoughts = list(given)
    elif given and not (_same(content.thoughts, given) or {*map(_plain, given)} <= {*map(_plain, content.thoughts)}):
        _two_thoughts()
    if content.thoughts and content.texts:
        content.texts[0] = _without_thought(content.texts[0], content.thoughts)


def different(thoughts: Iterable[str]) -> list[str]:
    """Return thoughts without those that are an earlier one, but for white space."""
    return list({_plain(thought): thought for thought in reversed(list(thoughts))}.values())[::-1]


def _without_thought(text: str, thoughts: list[str]) -> str:
    """Return an answer without the thought that it begins with, which is known already."""
    for tag, closing in _TAGS:
        before, found, rest = text.partition(closing)
        if not found:
            continue
        is_opened = before.lstrip().startswith(tag)
        thought = before.strip().removeprefix(tag)
        if _same([thought], thoughts) or (is_opened and not thought.strip()):
            return rest.lstrip()
        if is_opened:
            _two_thoughts()
    return text


def _two_thoughts() -> NoReturn:
    fail(FaultKind.BAD_REASONING, "the content has one thought, and a key of the turn has another; keep one")


def _same(thoughts: list[str], others: list[str]) -> bool:
    return "".join(map(_plain, thoughts)) == "".join(map(_plain, others))


def _plain(thought: str) -> str:
    return _SPACES.sub("", thought)
