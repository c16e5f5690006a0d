"""Write the Go TEMPLATE for a turn format.

Every constant text is a quoted string in an action, so none can be taken for template syntax. All unusual characters
are escaped, and trim markers remove the lines of the template itself, so that they leave no white space behind.
"""

from __future__ import annotations

from .turn_format import Affix, TurnFormat

_CONTENT = "{{ $m.Content }}"
_NOTE_SYSTEM = (
    '{{- $system := false }}{{- range .Messages }}{{ if eq .Role "system" }}{{ $system = true }}{{ end }}{{ end -}}'
)


def write_go_template(turns: TurnFormat, include_bos: bool) -> str:
    """Return the Go template for a Modelfile.

    Args:
        turns: the format to write.
        include_bos: print the BOS. Ollama's tokenizer adds it where the GGUF says so.

    Returns:
        The template. It loops over `.Messages`, so Ollama appends no `.Response` to it.
    """
    lines = [_NOTE_SYSTEM] if _notes_system(turns) else []
    lines.append(_start(turns, include_bos))
    if _first_user_differs(turns):
        lines.append("{{- $first := true }}")
    if turns.system_style == "last_user":
        lines.append("{{- $user := -1 }}")
        lines.append('{{- range $i, $m := .Messages }}{{ if eq $m.Role "user" }}{{ $user = $i }}{{ end }}{{ end }}')
    lines.append("{{- range $i, $m := .Messages }}")
    lines.append("{{- $last := eq (len (slice $.Messages $i)) 1 }}")
    lines += _turns(turns)
    if generation := go_text(turns.generation):
        lines.append('{{- if and $last (ne $m.Role "assistant") }}' + generation + "{{ end }}")
    lines.append("{{- end }}")
    return "\n".join(line for line in lines if line)


def go_text(text: str) -> str:
    """Return a Go template action that prints the text; "" for no text.

    Quotes are written as `\\x22`, so that a template never contains the triple quotes that end a value in a Modelfile.
    Characters that a Modelfile can't carry are written by number.
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


def _wrap(affix: Affix, value: str) -> str:
    return go_text(affix.before) + "{{ " + value + " }}" + go_text(affix.after)


def _start(turns: TurnFormat, include_bos: bool) -> str:
    bos = go_text(turns.bos if include_bos else "")
    opening = go_text(turns.opening)
    if turns.system_style == "turn" and turns.later_system is None:
        without_system = "{{ else }}" + opening if opening else ""
        return (
            bos + f"{{{{- if {_has_system(turns)} }}}}" + _wrap(turns.system, ".System") + without_system + "{{ end }}"
        )
    if turns.system_style == "turn" and opening:
        # In the Go of older Ollama versions `and` evaluates all its arguments: hence two conditions.
        no_system = 'ne (index .Messages 0).Role "system"'
        if not turns.wraps_empty_system:
            no_system = f"or ({no_system}) (not (index .Messages 0).Content)"
        return bos + "{{- if .Messages }}{{ if " + no_system + " }}" + opening + "{{ end }}{{ end }}"
    return bos + opening


def _notes_system(turns: TurnFormat) -> bool:
    """Whether the template has to know if there is a system turn, even an empty one."""
    is_joined = turns.system_style in ("first_user", "last_user") or (
        turns.system_style == "turn" and turns.later_system is None
    )
    return is_joined and turns.wraps_empty_system


def _has_system(turns: TurnFormat) -> str:
    """The condition that there is a system text to write."""
    return "$system" if _notes_system(turns) else "$.System"


def _turns(turns: TurnFormat) -> list[str]:
    lines = ['{{- if eq $m.Role "user" }}' + _before_user(turns) + _CONTENT + go_text(turns.user.after)]
    if turns.system_style == "turn" and turns.later_system:
        first, later = (_wrap(affix, "$m.Content") for affix in (turns.system, turns.later_system))
        both = first if first == later else "{{ if $i }}" + later + "{{ else }}" + first + "{{ end }}"
        if not turns.wraps_empty_system:
            both = "{{ if $m.Content }}" + both + "{{ end }}"
        lines.insert(0, '{{- if eq $m.Role "system" }}' + both)
        lines[1] = lines[1].replace("{{- if", "{{- else if", 1)
    before, after = go_text(turns.assistant.before), go_text(turns.assistant.after)
    if turns.generation != turns.assistant.before:
        before = "{{ if $last }}" + go_text(turns.generation) + "{{ else }}" + before + "{{ end }}"
    if after:
        after = "{{ if not $last }}" + after + "{{ end }}"
    lines.append('{{- else if eq $m.Role "assistant" }}' + before + _CONTENT + after)
    return [*lines, "{{- end }}"]


def _first_user_differs(turns: TurnFormat) -> bool:
    return turns.system_style == "first_user" or turns.first_user != turns.user.before


def _before_user(turns: TurnFormat) -> str:
    before = go_text(turns.user.before)
    first = go_text(turns.first_user)
    system = "{{ if " + _has_system(turns) + " }}" + _wrap(turns.system, "$.System") + "{{ else }}"
    if turns.system_style == "first_user":
        first = system + first + "{{ end }}"
    if _first_user_differs(turns):
        before = "{{ if $first }}" + first + "{{ $first = false }}{{ else }}" + before + "{{ end }}"
    if turns.system_style == "last_user":
        return "{{ if eq $i $user }}" + system + before + "{{ end }}{{ else }}" + before + "{{ end }}"
    return before
