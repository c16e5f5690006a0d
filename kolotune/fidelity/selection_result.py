"""The compared chats and the prompts in them, as a selection collects them."""

from __future__ import annotations

from dataclasses import dataclass, field

from .defects import Defect, Note
from .prompt_proof import Prompt
from .tasks import ComparedChat


@dataclass
class Selection:
    """The compared chats and the prompts in them.

    Attributes:
        chats: the sequences of the first prepared chats within the task's limits, at least one chat. Most chats are one
            sequence; in some each answer is one.
        sequences: for each chat, which of `chats` are its sequences.
        prompts: the prompt before each of their answers.
        expected: the answer to each prompt in the data; None where the data have none.
        probes: more prompts, for checking what is served.
        with_text: chats whose text is available; reproduced: those of them that get the prepared tokens again.
        is_whole: all prepared chats are in the selection.
    """

    chats: list[ComparedChat] = field(default_factory=list)
    sequences: list[range] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    expected: list[str | None] = field(default_factory=list)
    probes: list[Prompt] = field(default_factory=list)
    with_text: int = 0
    reproduced: int = 0
    is_whole: bool = False
    defects: list[Defect] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def compared_chat(ids: list[int], labelled: list[bool], end: int) -> ComparedChat:
    """Return a sequence as it is compared, given its labels and the token that ends an answer."""
    positions = [index - 1 for index in range(1, len(ids)) if labelled[index]]
    last = [number for number, at in enumerate(positions) if at + 2 >= len(ids) or not labelled[at + 2]]
    return ComparedChat(ids, positions, [number for number in last if ids[positions[number] + 1] == end])
