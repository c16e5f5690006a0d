"""Check the turns of a chat: who speaks when, and whether they say anything."""

from __future__ import annotations

from collections.abc import Sequence

from ..chat import Message
from .faults import Fault, FaultKind
from .tool_calls import writes_call


def order_faults(messages: Sequence[Message], numbers: Sequence[int] | None = None) -> list[Fault]:
    """Return every fault in the order of the turns.

    Args:
        messages: The turns.
        numbers: The number of each in messages to the user; None to count from 1.
    """
    if is_orderly(messages):
        return []
    faults: list[Fault] = []
    previous: Message | None = None
    counted = list(numbers if numbers is not None else range(1, len(messages) + 1))
    for at, (number, message) in enumerate(zip(counted, messages, strict=True)):
        faults += _turn_faults(message, previous, number, at == 0)
        if message.role != "system":
            previous = message
    if not any(message.role == "assistant" for message in messages):
        return [Fault(FaultKind.NO_ASSISTANT, "no assistant turn: nothing to train on"), *faults]
    if messages[-1].role in ("user", "tool"):
        cause = f"the last turn is the {messages[-1].role}'s; add an answer, or remove the turn"
        faults.append(Fault(FaultKind.NO_ANSWER, cause, turn=counted[-1]))
    return faults


def is_orderly(messages: Sequence[Message]) -> bool:
    """Whether the chat is questions and answers in alternation, as most chats are."""
    start = 1 if messages and messages[0].role == "system" else 0
    questions, answers = messages[start::2], messages[start + 1 :: 2]
    return (
        0 < len(questions) == len(answers)
        and all([message.role == "user" and not _is_silent(message) for message in questions])
        and all([message.role == "assistant" and not _is_silent(message) for message in answers])
    )


def _turn_faults(message: Message, previous: Message | None, number: int, is_first: bool) -> list[Fault]:
    faults = []
    before = previous.role if previous else None
    if message.role == "system" and not is_first:
        faults.append((FaultKind.SYSTEM_NOT_FIRST, "a system turn may only come first, and only once"))
    if message.role == "assistant" and before is None:
        faults.append((FaultKind.ASSISTANT_FIRST, "the assistant speaks before any user turn"))
    if message.role == "user" and before == "user":
        faults.append((FaultKind.TWO_USERS, "a second user turn in a row; join them"))
    if message.role == "assistant" and before == "assistant":
        faults.append((FaultKind.TWO_ASSISTANTS, "a second assistant turn in a row; join them"))
    if message.role == "tool" and not _may_precede_tool(previous):
        faults.append((FaultKind.TOOL_ORDER, "a tool turn must follow an assistant turn with tool_calls"))
    if _is_silent(message):
        kind = FaultKind.EMPTY_USER if message.role == "user" else FaultKind.EMPTY_ANSWER
        faults.append((kind, f"the {message.role}'s content is empty"))
    return [Fault(kind, detail, turn=number) for kind, detail in faults]


def _may_precede_tool(message: Message | None) -> bool:
    if message is None:
        return False
    return message.role == "tool" or bool(message.tool_calls) or writes_call(message.content)


def _is_silent(message: Message) -> bool:
    # A system turn or the result of a tool may be empty on purpose; a question or an answer may not.
    if message.role not in ("user", "assistant") or message.tool_calls:
        return False
    return not message.content.strip()
