"""Fix the order of turns where the user asks for it (``--fix-turns``); each change has a kind and is counted."""

from __future__ import annotations

import dataclasses
from enum import StrEnum

from ..chat import Message
from .messages import Turns


class TurnFix(StrEnum):
    """A change to the order of turns; the value is its sentence after a number of chats."""

    LAST_TURN = "chats lost what follows their last answer"
    FIRST_TURN = "chats lost what the assistant says before the first question"
    SYSTEM_MOVED = "chats got system turns that come later joined with the first"
    JOINED_USERS = "chats got user turns in a row joined"
    JOINED_ANSWERS = "chats got assistant turns in a row joined"


def fix_order(turns: Turns) -> tuple[TurnFix, ...]:
    """Change the order of turns in place, and return which changes that took."""
    pairs = list(zip(turns.messages, turns.numbers, strict=True))
    fixes: list[TurnFix] = []
    system = [pair for pair in pairs if pair[0].role == "system"]
    spoken = [pair for pair in pairs if pair[0].role != "system"]
    if len(system) > 1 or (system and pairs[0][0].role != "system"):
        text = "\n\n".join(dict.fromkeys(message.content for message, _ in system))
        system = [(Message("system", text), system[0][1])]
        fixes.append(TurnFix.SYSTEM_MOVED)
    while spoken and spoken[-1][0].role != "assistant":
        spoken.pop()
        fixes.append(TurnFix.LAST_TURN)
    while spoken and spoken[0][0].role == "assistant":
        spoken.pop(0)
        fixes.append(TurnFix.FIRST_TURN)
    joined: list[tuple[Message, int]] = []
    for message, number in spoken:
        previous = joined[-1][0] if joined else None
        in_one_channel = bool(joined) and turns.channels.get(joined[-1][1]) == turns.channels.get(number)
        if previous is None or not in_one_channel or not _can_join(previous, message):
            joined.append((message, number))
            continue
        joined[-1] = (_join(previous, message), joined[-1][1])
        fixes.append(TurnFix.JOINED_USERS if message.role == "user" else TurnFix.JOINED_ANSWERS)
    if joined:  # what has no answer at all stays as it is, and is reported as that
        turns.messages[:], turns.numbers[:] = map(list, zip(*[*system, *joined], strict=True))
    return tuple(dict.fromkeys(fixes)) if joined else ()


def _can_join(first: Message, second: Message) -> bool:
    # Templates write an answer's text before its calls; behind them it would move.
    keeps_order = not first.tool_calls or not second.content.strip()
    is_answer = first.role == "assistant" and first.weight == second.weight and keeps_order
    return first.role == second.role and (first.role == "user" or is_answer)


def _join(first: Message, second: Message) -> Message:
    def both(one: str | None, other: str | None) -> str:
        return "\n\n".join(text for text in (one, other) if text and text.strip())

    return dataclasses.replace(
        first,
        content=both(first.content, second.content),
        reasoning=both(first.reasoning, second.reasoning) or None,
        tool_calls=(*first.tool_calls, *second.tool_calls),
    )
