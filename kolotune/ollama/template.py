"""From a Jinja chat template to an equivalent Go template for Ollama: by probing, then by proof.

Nothing here knows a model by name. The chat template is asked to write chats of marked contents, the text
around the marks is taken for the turn format, and the format is believed only when it writes a battery of
other chats exactly as the chat template does. All chats of the battery end with a user turn and an open
answer, for that is what a server sends to a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from kolotune.foundation.errors import TemplateError

from .turn_format import Affix, TurnFormat, merge

__all__ = ["Affix", "NotDerivable", "RenderFn", "TurnFormat", "battery", "derive", "merge", "stop_strings"]

Messages = list[dict[str, Any]]
RenderFn = Callable[[Messages, bool], str]

# Contents that no template has in it, and that no filter changes.
_S, _S2 = "Zqsysaa", "Zqsysbb"
_U1, _U2, _U3 = "Zquseaa", "Zqusebb", "Zqusecc"
_A1, _A2 = "Zqassaa", "Zqassbb"


@dataclass(frozen=True)
class NotDerivable:
    """The chat template is of a kind that `TurnFormat` can't say; `reason` tells why, in one sentence."""

    reason: str


class _Failed(Exception):
    """Ends a derivation from anywhere in it; `derive` turns it into NotDerivable."""


def derive(render: RenderFn, bos: str) -> TurnFormat | NotDerivable:
    """Find the turn format of a chat template and prove it.

    Args:
        render: writes messages with the chat template; the second argument asks for the generation
            prompt. It raises TemplateError for a chat that the template refuses.
        bos: the token that begins a text, "" if the tokenizer has none.

    Returns:
        The format, with caveats for what can't be equal in Ollama, or the reason why there is none.
    """
    try:
        turns = _core(render, bos)
        proven = _with_system(render, turns)
        difference = _first_difference(render, proven, battery(system=not proven.refuses_system))
        if difference:
            _fail(difference)
    except _Failed as failure:
        return NotDerivable(str(failure))
    return replace(proven, caveats=proven.caveats + tuple(_caveats(render, proven)))


def stop_strings(
    turn_format: TurnFormat, eos_token: str, end_token: str, special_tokens: Collection[str]
) -> tuple[str, ...]:
    """The texts at which Ollama must stop an answer.

    Args:
        turn_format: the derived format.
        eos_token: the end token of the tokenizer.
        end_token: the token that really ends a turn; may be the same, or "".
        special_tokens: all special tokens of the tokenizer.

    Returns:
        The end tokens, then each special token that stands around finished turns, in the order of a
        chat, except the BOS, and except what the model itself writes after the generation prompt before
        its answer begins (a channel, say).
    """
    prompt, before = turn_format.generation, turn_format.assistant.before
    written = before[len(_common((prompt, before))) :]
    found = [end_token, eos_token]
    # The longest first, as the tokenizer reads them.
    tokens = sorted((token for token in special_tokens if token.strip()), key=lambda token: (-len(token), token))
    if tokens:
        pattern = re.compile("|".join(map(re.escape, tokens)))
        for text in turn_format.texts():
            found += (token for token in pattern.findall(text) if token not in written)
    return tuple(dict.fromkeys(stop for stop in found if stop and stop != turn_format.bos))


# ---------------------------------------------------------------- probing


def _fail(reason: str) -> NoReturn:
    raise _Failed(reason)


def _chat(*contents: str) -> Messages:
    """Turns from marked contents; the mark tells the role."""
    roles = {"Zqs": "system", "Zqu": "user", "Zqa": "assistant"}
    return [{"role": roles[content[:3]], "content": content} for content in contents]


def _pieces(text: str, contents: tuple[str, ...]) -> list[str] | None:
    """The text between the marks, or None if they do not all stand there once and in this order."""
    pieces = []
    for content in contents:
        before, mark, text = text.partition(content)
        if not mark or content in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _probe(render: RenderFn, contents: tuple[str, ...], open: bool = True) -> list[str]:
    """What the chat template writes around the contents of a chat, which it must take."""
    roles = ", ".join(message["role"] for message in _chat(*contents))
    try:
        text = render(_chat(*contents), open)
    except TemplateError as error:
        _fail(f"it refuses a chat of {roles}: {error.cause}")
    pieces = _pieces(text, contents)
    if pieces is None:
        _fail(f"it does not write the texts of a chat of {roles} once each and in order")
    return pieces


def _core(render: RenderFn, bos: str) -> TurnFormat:
    """The format of chats without a system turn."""
    head, to_answer, to_user, to_answer2, to_user2, to_generation = _probe(render, (_U1, _A1, _U2, _A2, _U3))
    if (to_answer, to_user) != (to_answer2, to_user2):
        _fail("it writes later turns otherwise than the first ones")
    if _probe(render, (_U1,)) != [head, to_generation]:
        _fail("it writes a chat of one turn otherwise than a longer one")
    user_after = _end_of_turn(_closing(render, (_U1,)), to_answer, to_generation)
    assistant_after = _end_of_turn(_closing(render, (_U1, _A1)), to_user)
    user = Affix(to_user[len(assistant_after) :], user_after)
    assistant = Affix(to_answer[len(user_after) :], assistant_after)
    generation = to_generation[len(user_after) :]
    # A BOS that also opens assistant turns is what every turn begins with (SmolLM2), not a mark of the start.
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


def _closing(render: RenderFn, contents: tuple[str, ...]) -> str | None:
    """What ends a chat that is not open; None if the template refuses such a chat."""
    try:
        pieces = _pieces(render(_chat(*contents), False), contents)
    except TemplateError:
        return None
    return pieces[-1] if pieces else None


def _end_of_turn(closing: str | None, *texts: str) -> str:
    """How much of the text after a content ends its turn; the rest begins the next turn.

    Chats that alternate read the same wherever the cut is. It matters for others, and for reading.
    """
    if closing is not None and all(text.startswith(closing) for text in texts):
        return closing
    # Some templates write one thing more at the very end (Phi 3). What is common ends the turn, but for the
    # begun token of the next one.
    common = _common([*texts, closing] if closing else texts)
    return re.sub(r"(<[^>\n]*|\[[^\]\n]*)$", "", common)


def _common(texts: Sequence[str]) -> str:
    """The beginning that all texts share."""
    low, high = min(texts), max(texts)
    size = next((place for place, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:size]


def _with_system(render: RenderFn, turns: TurnFormat) -> TurnFormat:
    """The same format with what it does to system turns."""
    contents = (_S, _U1, _A1, _U2, _A2, _U3)
    try:
        text = render(_chat(*contents), True)
    except TemplateError:
        return _refused(turns)
    if _S not in text:
        if text != render(_chat(*contents[1:]), True):
            _fail("it does not write the system text, yet writes something else because of it")
        return replace(turns, caveats=("The chat template leaves system texts out, and so does the Ollama template.",))
    first = _pieces(text, contents)
    last = _pieces(text, (*contents[1:5], _S, _U3))
    if first is not None:
        return _system_first(render, turns, first)
    if last is not None and last[4].startswith(turns.assistant.after):
        affix = Affix(last[4].removeprefix(turns.assistant.after), last[5])
        return replace(turns, system_style="last_user", system=affix)
    _fail("it writes the system text neither before the first user text nor before the last one")


def _refused(turns: TurnFormat) -> TurnFormat:
    """Ollama may send a system text all the same. To drop it in silence would be worse than to place it."""
    head = turns.opening + turns.first_user
    caveat = (
        "The chat template refuses system turns; in Ollama a system text is put before the first user text, "
        "a form that was never trained."
    )
    return replace(
        turns,
        opening="",
        first_user=head,
        system_style="first_user",
        system=Affix(head, "\n\n"),
        refuses_system=True,
        caveats=(caveat,),
    )


def _system_first(render: RenderFn, turns: TurnFormat, pieces: list[str]) -> TurnFormat:
    """The system text stands before the first user text: in a turn of its own, or folded into that turn."""
    head, to_user = pieces[0], pieces[1]
    if not head.startswith(turns.bos):
        _fail("it begins with the BOS only when there is no system text")
    head = head.removeprefix(turns.bos)
    if not to_user.endswith(turns.first_user):
        first_user = turns.opening + turns.first_user
        affix = Affix(head, to_user)
        return replace(turns, opening="", first_user=first_user, system_style="first_user", system=affix)
    affix = Affix(head, to_user.removesuffix(turns.first_user))
    later = _later_system(render, turns)
    return replace(turns, system_style="turn", system=affix, later_system=later)


def _later_system(render: RenderFn, turns: TurnFormat) -> Affix | None:
    """What stands around a system turn in the middle of a chat; None if that is no turn in its place."""
    contents = (_S, _U1, _A1, _S2, _U2)
    try:
        pieces = _pieces(render(_chat(*contents), True), contents)
    except TemplateError:
        return None
    if pieces is None:
        return None
    to_system, to_user = pieces[3], pieces[4]
    if not to_system.startswith(turns.assistant.after) or not to_user.endswith(turns.user.before):
        return None
    return Affix(to_system.removeprefix(turns.assistant.after), to_user.removesuffix(turns.user.before))


# ---------------------------------------------------------------- proof


# Texts that would show a wrong quote, an escape, a filter or template syntax taken for syntax.
_TEXTS = (
    "What is the capital of France?",
    'He said "yes", she said \'no\': \\ `back` """ticks""" \\n',
    "Jinja {{ user }} {% if x %}{# y #}{% endif %} and Go {{ .System }} {{- `x` -}}",
    "Grüße, \u4f60\u597d, \u0645\u0631\u062d \U0001f642\U0001f44d\U0001f3fd \u2028 \u00a0 \u200d end",
    "Line one\n\n  indented\n\ttab\n\n\n# last\r\nline",
    "x = {'a': [1, 2]}\nif x < 3 && y > 4: print(f\"{x}\") ### Instruction: <b>&amp;</b> [1] |2|",
    "7",
)


def battery(system: bool) -> list[Messages]:
    """Chats as a server sends them: all end with a user turn.

    Args:
        system: True for chats with a system turn too.

    Returns:
        Chats of one to five exchanges; each of the difficult texts stands in each role.
    """
    roles = ("user", "assistant")
    chats: list[Messages] = []
    for start in range(len(_TEXTS)):
        for exchanges in (1, 2, 3) if start else (1, 2, 3, 5):
            texts = [_TEXTS[(start + step) % len(_TEXTS)] for step in range(2 * exchanges)]
            turns = [{"role": roles[step % 2], "content": text} for step, text in enumerate(texts[1:])]
            chats.append(turns)
            if system:
                chats.append([{"role": "system", "content": texts[0]}, *turns])
    return chats


def _first_difference(render: RenderFn, turns: TurnFormat, chats: list[Messages]) -> str | None:
    """A sentence about the first chat that the two write differently."""
    for chat in chats:
        roles = ", ".join(message["role"] for message in chat)
        try:
            wanted = render([dict(message) for message in chat], True)
        except TemplateError as error:
            return f"it refuses a chat of {roles}: {error.cause}"
        got = turns.render(chat, True)
        if got != wanted:
            place = len(_common((wanted, got)))
            there, here = (text[max(0, place - 20) : place + 40] for text in (wanted, got))
            return f"for a chat of {roles} it writes {there!r} where the derived format has {here!r}"
    return None


_SPACED = "\n  word \n"


def _caveats(render: RenderFn, turns: TurnFormat) -> Iterator[str]:
    """What Ollama will write otherwise, found by chats outside of the battery."""

    def differs(*messages: tuple[str, str]) -> bool:
        chat = [{"role": role, "content": content} for role, content in messages]
        return _first_difference(render, turns, [chat]) is not None

    user, answer = ("user", _U1), ("assistant", _A1)
    spaced = {
        "system": (("system", _SPACED), user),
        "user": (("user", _SPACED),),
        "assistant": (user, ("assistant", _SPACED), ("user", _U2)),
    }
    if turns.refuses_system:
        del spaced["system"]
    for role, chat in spaced.items():
        if differs(*chat):
            yield f"The chat template changes white space around {role} texts; Ollama sends them as they are."
    if differs(user, ("assistant", f"<think>\n{_A2}\n</think>\n\n{_A1}"), ("user", _U2)):
        yield "The chat template drops or changes thoughts in earlier answers; Ollama sends them as they are."
    if differs(answer, user):
        yield (
            "The chat template does not take a chat that begins with an answer, or writes it otherwise; "
            "Ollama sends such chats when it drops old turns."
        )
    if turns.refuses_system:
        return
    if differs(("system", ""), user):
        yield "The chat template writes an empty system text otherwise than the Ollama template."
    if differs(("system", _S), user, answer, ("system", _S2), ("user", _U2)):
        yield (
            "A system turn in the middle of a chat is refused by the chat template, or is written otherwise "
            "than in Ollama."
        )
    elif differs(user, answer, ("system", _S), ("user", _U2)):
        yield "The chat template writes otherwise a chat whose only system turn is not at its start."
