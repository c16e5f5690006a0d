"""How a chat template writes turns: constant texts around contents.

`TurnFormat.render` writes chats in Python, for the proof against the Jinja template; `go_template_writer` writes the Go
template for Ollama. The tests run the latter through Go's own text/template and compare the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from os.path import commonprefix
from typing import Literal

SystemStyle = Literal["turn", "first_user", "last_user", "ignored"]
"""Where the system text is written: in separate turns, in the first or the last user turn, or nowhere."""


class CaveatKind(Enum):
    """How Ollama's text may still differ from the chat template's."""

    SYSTEM_IGNORED = "The chat template leaves system texts out, and so does the Ollama template."
    SYSTEM_REFUSED = (
        "The chat template refuses system turns; Ollama and llama.cpp put a system text in front of the first user "
        "text, on a line of its own, a form that was never trained."
    )
    SPACE_CHANGED = "The chat template changes white space around {role} texts; Ollama sends them as they are."
    THOUGHTS_CHANGED = "The chat template drops or changes thoughts in earlier answers; Ollama sends them as they are."
    ANSWER_FIRST = (
        "The chat template does not take a chat that begins with an answer, or writes it otherwise; "
        "Ollama sends such chats when it drops old turns."
    )
    EMPTY_SYSTEM = "The chat template writes an empty system text otherwise than the Ollama template."
    SECOND_SYSTEM = (
        "A system turn in the middle of a chat is refused by the chat template, or is written otherwise than in Ollama."
    )
    LATE_SYSTEM = "The chat template writes otherwise a chat whose only system turn is not at its start."


@dataclass(frozen=True)
class Caveat:
    """One caveat; `role` is that of the texts it is about, where there is one."""

    kind: CaveatKind
    role: str = ""

    def __str__(self) -> str:
        return self.kind.value.format(role=self.role)


@dataclass(frozen=True)
class Affix:
    """The text before and after a content."""

    before: str
    after: str

    def wrap(self, content: str) -> str:
        """Return the content between the two."""
        return f"{self.before}{content}{self.after}"


@dataclass(frozen=True)
class TurnFormat:
    """How a chat is written, in constant texts.

    Attributes:
        bos: the token that begins the text; "" if the template writes none or the token is part of a turn.
        opening: text before the first turn when there is no system text (a default system block, for example).
        user, assistant: the text around user and assistant turns.
        first_user: text before the first user content; mostly the same as before all others.
        generation: text before an answer to be generated.
        system_style: where the system text is written.
        system: the text around the system text. For `first_user` and `last_user` it extends to the user's own content
            and replaces the text that is there without a system text.
        later_system: the text around a system turn that is not the first turn. Without it, all system texts are joined
            and written where the first one would be.
        wraps_empty_system: an empty system text is written like any other; otherwise as if there were none.
        refuses_system: the chat template refuses system turns; they are written as llama.cpp's server does then.
        caveats: where Ollama's text may still differ from the chat template's.
    """

    bos: str
    opening: str
    user: Affix
    assistant: Affix
    first_user: str
    generation: str
    system_style: SystemStyle
    system: Affix = Affix("", "")
    later_system: Affix | None = None
    wraps_empty_system: bool = False
    refuses_system: bool = False
    caveats: tuple[Caveat, ...] = ()

    def render(self, messages: Sequence[Mapping[str, object]], open: bool) -> str:
        """Return what the Go template prints in Ollama, with the BOS.

        Args:
            messages: turns with `role` and `content`. Neighbours of one role are merged, as Ollama does, and roles
                other than system, user and assistant are left out.
            open: True for what Ollama sends to the model: an assistant turn at the end is left open for the model to
                continue, any other end is followed by the generation prompt. False closes the last turn instead.
        """
        turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in merge_turns(messages)]
        systems = self._systems(turns)
        users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
        parts = [self.bos, self._start(turns, systems)]
        for index, turn in enumerate(turns):
            role, content = turn["role"], turn["content"]
            last = open and index == len(turns) - 1
            if role == "system":
                parts.append(self._system_turn(content, is_first=index == 0))
            elif role == "user":
                first_or_last = index == users[0], index == users[-1]
                parts += [self._user_before(*first_or_last, systems), content, self.user.after]
            elif role == "assistant":
                parts.append(self.generation + content if last else self.assistant.wrap(content))
            if last and role != "assistant":
                parts.append(self.generation)
        return "".join(parts)

    def _systems(self, turns: Sequence[Mapping[str, str]]) -> str | None:
        """All system texts; None if there is nothing to write."""
        texts = [turn["content"] for turn in turns if turn["role"] == "system"]
        joined = "\n\n".join(texts)
        return joined if joined or (texts and self.wraps_empty_system) else None

    def _is_written(self, content: str) -> bool:
        return bool(content) or self.wraps_empty_system

    def _system_turn(self, content: str, is_first: bool) -> str:
        if self.system_style != "turn" or self.later_system is None or not self._is_written(content):
            return ""
        return (self.system if is_first else self.later_system).wrap(content)

    def _start(self, turns: Sequence[Mapping[str, str]], systems: str | None) -> str:
        if self.system_style == "turn":
            if self.later_system is None and systems is not None:
                return self.system.wrap(systems)
            first = turns[0] if turns else {"role": "system", "content": "-"}
            if self.later_system is not None and first["role"] == "system" and self._is_written(first["content"]):
                return ""
        return self.opening

    def _user_before(self, first: bool, last: bool, systems: str | None) -> str:
        is_place = (first and self.system_style == "first_user") or (last and self.system_style == "last_user")
        if systems is not None and is_place:
            return self.system.wrap(systems)
        return self.first_user if first else self.user.before

    def texts(self) -> Iterator[str]:
        """Yield all constant texts around finished turns, in the order in which a chat shows them."""
        yield self.opening
        yield self.first_user
        for affix in (self.system, self.user, self.assistant, self.later_system or self.system):
            yield affix.before
            yield affix.after


def common_prefix(*texts: str) -> str:
    """Return the longest prefix that all texts share."""
    return commonprefix(texts)  # noqa: RUF071 - characters are compared, these are not paths


def merge_turns(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Return the turns that Ollama gives to a template: neighbours of one role are one turn.

    This is `collate` in Ollama's template/template.go.

    Args:
        messages: turns with `role` and `content`, and whatever else.

    Returns:
        New turns. The texts of merged ones are joined by an empty line; of the rest only the first one's is kept. The
        results of tools are never merged.
    """
    turns: list[dict[str, object]] = []
    for message in messages:
        if turns and turns[-1]["role"] == message["role"] != "tool":
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{message['content']}"
        else:
            turns.append(dict(message))
    return turns
