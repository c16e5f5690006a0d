"""Derive Ollama's Go TEMPLATE from a Jinja chat template: by probing, then by proof.

Nothing here knows a model by name. The chat template writes chats of marked contents, and the text around the marks is
taken for the turn format. The format is accepted only when it writes a battery of other chats exactly as the chat
template does (`template_proof`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NoReturn

from kolotune.foundation.errors import TemplateError
from kolotune.foundation.typed_storage import JsonObject

from .template_proof import Render, battery, find_caveats, first_difference
from .turn_format import Affix, Caveat, CaveatKind, TurnFormat, common_prefix

# Contents that no template contains, and that no filter changes.
_S, _S2 = "Zqsysaa", "Zqsysbb"
_U1, _U2, _U3 = "Zquseaa", "Zqusebb", "Zqusecc"
_A1, _A2 = "Zqassaa", "Zqassbb"


class Obstacle(Enum):
    """Why no turn format can be derived."""

    CHAT_REFUSED = "it refuses a chat of {detail}"
    TEXTS_CHANGED = "it does not write the texts of a chat of {detail} once each and in order"
    LATER_TURNS_DIFFER = "it writes later turns differently from the first ones"
    SINGLE_TURN_DIFFERS = "it writes a chat of one turn differently from a longer one"
    SYSTEM_CHANGES_OTHERS = "it does not write the system text, yet writes something else because of it"
    SYSTEM_ELSEWHERE = "it writes the system text neither before the first user text nor before the last one"
    BOS_WITHOUT_SYSTEM = "it begins with the BOS only when there is no system text"
    NOT_PROVEN = "{detail}"


@dataclass(frozen=True)
class NotDerivable:
    """A chat template that a `TurnFormat` can't describe."""

    obstacle: Obstacle
    detail: str = ""

    @property
    def reason(self) -> str:
        """The obstacle in one sentence, without a full stop."""
        return self.obstacle.value.format(detail=self.detail)


class _DerivationFailed(Exception):
    """Ends a derivation; `derive` returns its `NotDerivable`."""

    def __init__(self, reason: NotDerivable) -> None:
        super().__init__(reason.reason)
        self.reason = reason


def derive(render: Render, bos: str) -> TurnFormat | NotDerivable:
    """Derive the turn format of a chat template, and prove it.

    Args:
        render: writes messages with the chat template; the second argument asks for the generation prompt. It raises
            `TemplateError` for a chat that the template refuses.
        bos: the token that begins a text, "" if the tokenizer has none.

    Returns:
        The format, with caveats for what can't be equal in Ollama, or the reason why there is none.
    """
    try:
        turns = _with_empty_system(render, _with_system(render, _without_system(render, bos)))
        difference = first_difference(render, turns, battery(system=not turns.refuses_system))
        if difference:
            _fail(Obstacle.NOT_PROVEN, difference)
    except _DerivationFailed as failure:
        return failure.reason
    return replace(turns, caveats=turns.caveats + tuple(find_caveats(render, turns)))


def _fail(obstacle: Obstacle, detail: str = "") -> NoReturn:
    raise _DerivationFailed(NotDerivable(obstacle, detail))


def _chat(*contents: str) -> list[JsonObject]:
    """Turns from marked contents; the mark determines the role."""
    roles = {"Zqs": "system", "Zqu": "user", "Zqa": "assistant"}
    return [{"role": roles[content[:3]], "content": content} for content in contents]


def _split_at(contents: Sequence[str], text: str) -> list[str] | None:
    """The text between the contents; None if they are not all there, once each and in this order."""
    pieces = []
    for content in contents:
        before, mark, text = text.partition(content)
        if not mark or content in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _probe(render: Render, contents: tuple[str, ...]) -> list[str]:
    """What the chat template writes around the contents of a chat that it has to accept."""
    roles = ", ".join(str(message["role"]) for message in _chat(*contents))
    try:
        text = render(_chat(*contents), True)
    except TemplateError as error:
        _fail(Obstacle.CHAT_REFUSED, f"{roles}: {error.cause}")
    pieces = _split_at(contents, text)
    if pieces is None:
        _fail(Obstacle.TEXTS_CHANGED, roles)
    return pieces


def _without_system(render: Render, bos: str) -> TurnFormat:
    """The format of chats without a system turn."""
    head, to_answer, to_user, to_answer2, to_user2, to_generation = _probe(render, (_U1, _A1, _U2, _A2, _U3))
    if (to_answer, to_user) != (to_answer2, to_user2):
        _fail(Obstacle.LATER_TURNS_DIFFER)
    if _probe(render, (_U1,)) != [head, to_generation]:
        _fail(Obstacle.SINGLE_TURN_DIFFERS)
    user_after = _end_of_turn(_closing(render, (_U1,)), to_answer, to_generation)
    assistant_after = _end_of_turn(_closing(render, (_U1, _A1)), to_user)
    user = Affix(to_user[len(assistant_after) :], user_after)
    assistant = Affix(to_answer[len(user_after) :], assistant_after)
    generation = to_generation[len(user_after) :]
    # A BOS that also opens assistant turns begins every turn (SmolLM2); it does not mark the start.
    has_bos = bos != "" and head.startswith(bos) and not (assistant.before + generation).startswith(bos)
    head = head.removeprefix(bos) if has_bos else head
    same = head.endswith(user.before)
    return TurnFormat(
        bos=bos if has_bos else "",
        opening=head.removesuffix(user.before) if same else "",
        user=user,
        assistant=assistant,
        first_user=user.before if same else head,
        generation=generation,
        system_style="ignored",
    )


def _closing(render: Render, contents: tuple[str, ...]) -> str | None:
    """What ends a chat that is not open; None if the template refuses such a chat."""
    try:
        pieces = _split_at(contents, render(_chat(*contents), False))
    except TemplateError:
        return None
    return pieces[-1] if pieces else None


def _end_of_turn(closing: str | None, *texts: str) -> str:
    """How much of the text after a content ends its turn; the rest begins the next turn.

    In chats that alternate, any cut gives the same text. It matters for other chats, and for readers.
    """
    if closing is not None and all(text.startswith(closing) for text in texts):
        return closing
    # Some templates write one thing more at the very end (Phi 3). The common prefix ends the turn, without the first
    # part of a token that begins the next one.
    common = common_prefix(*texts, *([closing] if closing else []))
    return re.sub(r"(<[^>\n]*|\[[^\]\n]*)$", "", common)


def _with_system(render: Render, turns: TurnFormat) -> TurnFormat:
    """Return the format with its treatment of system turns."""
    contents = (_S, _U1, _A1, _U2, _A2, _U3)
    try:
        text = render(_chat(*contents), True)
    except TemplateError:
        return _refusing_system(turns)
    if _S not in text:
        if text != render(_chat(*contents[1:]), True):
            _fail(Obstacle.SYSTEM_CHANGES_OTHERS)
        return replace(turns, caveats=(Caveat(CaveatKind.SYSTEM_IGNORED),))
    first = _split_at(contents, text)
    last = _split_at((*contents[1:5], _S, _U3), text)
    if first is not None:
        return _system_first(render, turns, first)
    if last is not None and last[4].startswith(turns.assistant.after):
        affix = Affix(last[4].removeprefix(turns.assistant.after), last[5])
        return replace(turns, system_style="last_user", system=affix)
    _fail(Obstacle.SYSTEM_ELSEWHERE)


def _refusing_system(turns: TurnFormat) -> TurnFormat:
    """Ollama may send a system text all the same; it is written where llama.cpp's server puts it then."""
    head = turns.opening + turns.first_user
    return replace(
        turns,
        opening="",
        first_user=head,
        system_style="first_user",
        system=Affix(head, "\n"),
        wraps_empty_system=True,
        refuses_system=True,
        caveats=(Caveat(CaveatKind.SYSTEM_REFUSED),),
    )


def _system_first(render: Render, turns: TurnFormat, pieces: list[str]) -> TurnFormat:
    """The system text is before the first user text: in a separate turn, or inside that user turn."""
    head, to_user = pieces[0], pieces[1]
    if not head.startswith(turns.bos):
        _fail(Obstacle.BOS_WITHOUT_SYSTEM)
    head = head.removeprefix(turns.bos)
    if not to_user.endswith(turns.first_user):
        first_user = turns.opening + turns.first_user
        affix = Affix(head, to_user)
        return replace(turns, opening="", first_user=first_user, system_style="first_user", system=affix)
    affix = Affix(head, to_user.removesuffix(turns.first_user))
    later = _later_system(render, turns)
    return replace(turns, system_style="turn", system=affix, later_system=later)


def _with_empty_system(render: Render, turns: TurnFormat) -> TurnFormat:
    """Return the format with its treatment of an empty system text; what fits neither way is a caveat later."""
    if turns.refuses_system:
        return turns
    chat: list[JsonObject] = [{"role": "system", "content": ""}, *_chat(_U1, _A1, _U2)]
    # A turn of its own is written even if it is empty, unless the template has other plans.
    wraps = turns.system_style == "turn" and turns.later_system is not None
    candidates = [replace(turns, wraps_empty_system=choice) for choice in (wraps, not wraps)]
    return next((one for one in candidates if first_difference(render, one, [chat]) is None), candidates[0])


def _later_system(render: Render, turns: TurnFormat) -> Affix | None:
    """The text around a system turn in the middle of a chat; None if it is not written as a turn there."""
    contents = (_S, _U1, _A1, _S2, _U2)
    try:
        pieces = _split_at(contents, render(_chat(*contents), True))
    except TemplateError:
        return None
    if pieces is None:
        return None
    to_system, to_user = pieces[3], pieces[4]
    if not to_system.startswith(turns.assistant.after) or not to_user.endswith(turns.user.before):
        return None
    return Affix(to_system.removeprefix(turns.assistant.after), to_user.removesuffix(turns.user.before))
