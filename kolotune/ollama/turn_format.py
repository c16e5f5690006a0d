"""The form in which a chat template writes turns, as text around contents, and the Go template that does it.

`TurnFormat` says the same thing twice: `render` in Python, for the proof against the Jinja template, and
`go_template` for Ollama. The tests run the second through Go's own text/template and compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# Where the system text stands: in turns of its own, in the first or the last user turn, or nowhere.
SystemStyle = Literal["turn", "first_user", "last_user", "ignored"]


@dataclass(frozen=True)
class Affix:
    """The text before and after a content."""

    before: str
    after: str

    def wrap(self, content: str) -> str:
        """The content between the two."""
        return f"{self.before}{content}{self.after}"


@dataclass(frozen=True)
class TurnFormat:
    """How a chat is written, in constant texts.

    Args:
        bos: the token that begins the text, "" if the template writes none or the token is part of a turn.
        opening: what comes before the first turn when there is no system text (a default system block, say).
        user, assistant: what stands around the turns of the two.
        first_user: what stands before the first user text; mostly the same as before all others.
        generation: what comes before an answer to be generated.
        system_style: where the system text goes.
        system: what stands around the system text; for `first_user` and `last_user` it reaches up to the
            user's own text and takes the place of what stands there otherwise.
        later_system: what stands around a system turn that is not the first turn. Without it, all system
            texts are joined and stand where the first would.
        refuses_system: the chat template refuses system turns, so where they stand is kolotune's choice.
        caveats: where Ollama's text may still differ from the chat template's, a sentence each.
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
    refuses_system: bool = False
    caveats: tuple[str, ...] = ()

    def render(self, messages: Sequence[Mapping[str, Any]], open: bool) -> str:
        """What the Go template prints in Ollama, with the BOS.

        Args:
            messages: turns with `role` and `content`; neighbours of one role are merged, as Ollama does,
                and roles other than system, user and assistant are left out.
            open: True for what Ollama sends to the model: an assistant turn at the end is left open for
                the model to go on, any other end is followed by the generation prompt. False closes the
                last turn instead.

        Returns:
            The text.
        """
        turns = merge(messages)
        systems = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
        users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
        parts = [self.bos, self._start(turns, systems)]
        for index, turn in enumerate(turns):
            role, content = turn["role"], turn["content"]
            last = open and index == len(turns) - 1
            if role == "system" and self.system_style == "turn" and self.later_system:
                parts.append((self.later_system if index else self.system).wrap(content))
            elif role == "user":
                first_or_last = index == users[0], index == users[-1]
                parts += [self._user_before(*first_or_last, systems), content, self.user.after]
            elif role == "assistant":
                parts.append(self.generation + content if last else self.assistant.wrap(content))
            if last and role != "assistant":
                parts.append(self.generation)
        return "".join(parts)

    def _start(self, turns: Sequence[Mapping[str, str]], systems: str) -> str:
        if self.system_style == "turn":
            if self.later_system is None and systems:
                return self.system.wrap(systems)
            if self.later_system is not None and (not turns or turns[0]["role"] == "system"):
                return ""
        return self.opening

    def _user_before(self, first: bool, last: bool, systems: str) -> str:
        if systems and ((first and self.system_style == "first_user") or (last and self.system_style == "last_user")):
            return self.system.wrap(systems)
        return self.first_user if first else self.user.before

    def texts(self) -> Iterator[str]:
        """All constant texts around finished turns, in the order in which a chat shows them."""
        yield self.opening
        yield self.first_user
        affixes = (self.system, self.user, self.assistant, self.later_system or self.system)
        for affix in affixes:
            yield affix.before
            yield affix.after

    def go_template(self, include_bos: bool) -> str:
        """The Go template for a Modelfile.

        Every constant text stands as a quoted string in an action, so none of them can be taken for
        template syntax, all unusual characters are escaped, and the lines of the template itself, which
        the trim markers remove, leave no white space behind.

        Args:
            include_bos: True to print the BOS. Ollama's tokenizer adds it by itself where the GGUF says so.

        Returns:
            The template; it loops over `.Messages`, so Ollama appends no `.Response` to it.
        """
        lines = [self._go_start(include_bos)]
        if self._first_differs():
            lines.append("{{- $first := true }}")
        if self.system_style == "last_user":
            lines.append("{{- $user := -1 }}")
            lines.append('{{- range $i, $m := .Messages }}{{ if eq $m.Role "user" }}{{ $user = $i }}{{ end }}{{ end }}')
        lines.append("{{- range $i, $m := .Messages }}")
        lines.append("{{- $last := eq (len (slice $.Messages $i)) 1 }}")
        lines += self._go_turns()
        if generation := go_text(self.generation):
            lines.append('{{- if and $last (ne $m.Role "assistant") }}' + generation + "{{ end }}")
        lines.append("{{- end }}")
        return "\n".join(line for line in lines if line)

    def _go_start(self, include_bos: bool) -> str:
        bos = go_text(self.bos if include_bos else "")
        opening = go_text(self.opening)
        if self.system_style == "turn" and self.later_system is None:
            other = "{{ else }}" + opening if opening else ""
            return bos + "{{- if .System }}" + _go_wrap(self.system, ".System") + other + "{{ end }}"
        if self.system_style == "turn" and opening:
            # `and` calls all its arguments in the Go of older Ollama versions: hence two conditions.
            first = '{{- if .Messages }}{{ if ne (index .Messages 0).Role "system" }}'
            return bos + first + opening + "{{ end }}{{ end }}"
        return bos + opening

    def _go_turns(self) -> list[str]:
        lines = ['{{- if eq $m.Role "user" }}' + self._go_user() + _go_content + go_text(self.user.after)]
        if self.system_style == "turn" and self.later_system:
            first, later = (_go_wrap(affix, "$m.Content") for affix in (self.system, self.later_system))
            both = first if first == later else "{{ if $i }}" + later + "{{ else }}" + first + "{{ end }}"
            lines.insert(0, '{{- if eq $m.Role "system" }}' + both)
            lines[1] = lines[1].replace("{{- if", "{{- else if", 1)
        before, after = go_text(self.assistant.before), go_text(self.assistant.after)
        if self.generation != self.assistant.before:
            before = "{{ if $last }}" + go_text(self.generation) + "{{ else }}" + before + "{{ end }}"
        if after:
            after = "{{ if not $last }}" + after + "{{ end }}"
        lines.append('{{- else if eq $m.Role "assistant" }}' + before + _go_content + after)
        return [*lines, "{{- end }}"]

    def _first_differs(self) -> bool:
        return self.system_style == "first_user" or self.first_user != self.user.before

    def _go_user(self) -> str:
        before = go_text(self.user.before)
        first = go_text(self.first_user)
        system = "{{ if $.System }}" + _go_wrap(self.system, "$.System") + "{{ else }}"
        if self.system_style == "first_user":
            first = system + first + "{{ end }}"
        if self._first_differs():
            before = "{{ if $first }}" + first + "{{ $first = false }}{{ else }}" + before + "{{ end }}"
        if self.system_style == "last_user":
            return "{{ if eq $i $user }}" + system + before + "{{ end }}{{ else }}" + before + "{{ end }}"
        return before


_go_content = "{{ $m.Content }}"


def merge(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The turns as Ollama hands them to a template: neighbours of one role are one turn.

    Args:
        messages: turns with `role` and `content`.

    Returns:
        New turns; the texts of merged ones are joined by an empty line.
    """
    turns: list[dict[str, str]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if turns and turns[-1]["role"] == role and role != "tool":
            turns[-1]["content"] += "\n\n" + content
        else:
            turns.append({"role": role, "content": content})
    return turns


def go_text(text: str) -> str:
    """A Go template action that prints the text, "" for no text.

    Quotes are written as `\\x22`, so that a template never holds the triple quotes that end a value in a
    Modelfile, and characters that a Modelfile can't carry are written by number.
    """
    return "{{ " + f'"{"".join(map(_go_character, text))}"' + " }}" if text else ""


def _go_character(character: str) -> str:
    if character == "\n":
        return "\\n"
    if character == "\\":
        return "\\\\"
    if character == '"':
        return "\\x22"
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def _go_wrap(affix: Affix, value: str) -> str:
    return go_text(affix.before) + "{{ " + value + " }}" + go_text(affix.after)
