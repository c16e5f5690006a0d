"""Prove that a turn format writes chats as the chat template does, and find where Ollama's text still differs.

All chats of the battery end with a user turn and an open answer, because that is what a server sends to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kolotune.foundation.errors import TemplateError
from kolotune.foundation.typed_storage import JsonObject

from .turn_format import Caveat, CaveatKind, TurnFormat, common_prefix

Render = Callable[[list[JsonObject], bool], str]
"""Writes messages with the chat template; the second argument asks for the generation prompt."""

# Texts that reveal a wrong quote, an escape, a filter, or content that is taken for template syntax.
_TEXTS = (
    "What is the capital of France?",
    'He said "yes", she said \'no\': \\ `back` """ticks""" \\n',
    "Jinja {{ user }} {% if x %}{# y #}{% endif %} and Go {{ .System }} {{- `x` -}}",
    "Grüße, \u4f60\u597d, \u0645\u0631\u062d \U0001f642\U0001f44d\U0001f3fd \u2028 \u00a0 \u200d end",
    "Line one\n\n  indented\n\ttab\n\n\n# last\r\nline",
    "x = {'a': [1, 2]}\nif x < 3 && y > 4: print(f\"{x}\") ### Instruction: <b>&amp;</b> [1] |2|",
    "7",
)


def battery(system: bool) -> list[list[JsonObject]]:
    """Return chats as a server sends them; all end with a user turn.

    Args:
        system: include chats with a system turn.

    Returns:
        Chats of one to five exchanges, with each of the difficult texts in each role.
    """
    roles = ("user", "assistant")
    chats: list[list[JsonObject]] = []
    for start in range(len(_TEXTS)):
        for exchanges in (1, 2, 3) if start else (1, 2, 3, 5):
            texts = [_TEXTS[(start + step) % len(_TEXTS)] for step in range(2 * exchanges)]
            turns: list[JsonObject] = [
                {"role": roles[step % 2], "content": text} for step, text in enumerate(texts[1:])
            ]
            chats.append(turns)
            if system:
                chats.append([{"role": "system", "content": texts[0]}, *turns])
    return chats


def first_difference(render: Render, turns: TurnFormat, chats: list[list[JsonObject]]) -> str | None:
    """Describe the first chat that the two write differently; None when there is none."""
    for chat in chats:
        roles = ", ".join(str(message["role"]) for message in chat)
        try:
            expected = render([dict(message) for message in chat], True)
        except TemplateError as error:
            return f"it refuses a chat of {roles}: {error.cause}"
        actual = turns.render(chat, True)
        if actual != expected:
            position = len(common_prefix(expected, actual))
            theirs, ours = (text[max(0, position - 20) : position + 40] for text in (expected, actual))
            return f"for a chat of {roles} it writes {theirs!r} where the derived format has {ours!r}"
    return None


_SPACED = "\n  word \n"


def find_caveats(render: Render, turns: TurnFormat) -> Iterator[Caveat]:
    """Yield where Ollama's text differs from the chat template's, for chats outside of the battery."""

    def differs(*messages: tuple[str, str]) -> bool:
        chat: list[JsonObject] = [{"role": role, "content": content} for role, content in messages]
        return first_difference(render, turns, [chat]) is not None

    system, user = ("system", "Zqsysaa"), ("user", "Zquseaa")
    answer, question = ("assistant", "Zqassaa"), ("user", "Zqusebb")
    spaced = {
        "system": (("system", _SPACED), user),
        "user": (("user", _SPACED),),
        "assistant": (user, ("assistant", _SPACED), question),
    }
    if turns.refuses_system:
        del spaced["system"]
    for role, chat in spaced.items():
        if differs(*chat):
            yield Caveat(CaveatKind.SPACE_CHANGED, role)
    if differs(user, ("assistant", "<think>\nZqassbb\n</think>\n\nZqassaa"), question):
        yield Caveat(CaveatKind.THOUGHTS_CHANGED)
    if differs(answer, user):
        yield Caveat(CaveatKind.ANSWER_FIRST)
    if turns.refuses_system:
        return
    if differs(("system", ""), user):
        yield Caveat(CaveatKind.EMPTY_SYSTEM)
    if differs(system, user, answer, ("system", "Zqsysbb"), question):
        yield Caveat(CaveatKind.SECOND_SYSTEM)
    elif differs(user, answer, system, question):
        yield Caveat(CaveatKind.LATE_SYSTEM)
