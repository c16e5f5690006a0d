"""What Ollama takes templates to be capable of."""

from __future__ import annotations

import pytest

from kolotune.ollama.template_capabilities import Capability, TemplateCapabilities, go_capabilities, jinja_capabilities

TOOLS, INSERT, THINKING = Capability.TOOLS, Capability.INSERT, Capability.THINKING


@pytest.mark.parametrize(
    ("jinja", "named"),
    [
        ("", ()),
        ("{# the word tools is enough #}", (TOOLS,)),
        ("tool_call", (TOOLS,)),
        ("tool", ()),
        ("<think>", ()),
        ("<think></think>", (THINKING,)),
        ("content.split('</think>')", (THINKING,)),
        ("content.split('</think>') reasoning_content", ()),
        ("content.split('</think>') <SPECIAL_12>", ()),
        ("content.split('</think>') reasoning_content <think> tools", (TOOLS, THINKING)),
    ],
)
def test_words_in_jinja(jinja: str, named: tuple[Capability, ...]) -> None:
    assert jinja_capabilities(jinja) == TemplateCapabilities(named)


@pytest.mark.parametrize("result", ["tool_response", "tool_results", "ipython", "m['role'] == 'tool'"])
def test_the_round_trip_in_jinja(result: str) -> None:
    assert jinja_capabilities(f"tool_calls {result}").round_trip
    assert not jinja_capabilities(f"tool_call {result}").round_trip
    assert not jinja_capabilities("tool_calls").round_trip


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ range .Messages }}{{ .Content }}{{ end }}", ()),
        ("{{ if $.Tools }}{{ end }}", (TOOLS,)),
        ("{{ if .tools }}{{ end }}", (TOOLS,)),
        ("{{ $tools := 1 }}{{ $tools }}", ()),
        ("{{ .Tools.Suffix }}", (TOOLS, INSERT)),
        # A field of what is in brackets hides all that is in them.
        ("{{ (index .Tools 0).Suffix }}", ()),
        ("{{ if (eq .Suffix 1) }}{{ end }}", (INSERT,)),
        ("{{ range .Messages }}<t>{{ .Thinking }}</t>{{ end }}", (THINKING,)),
        ("{{ range .Messages }} {{ .Thinking }}</t>{{ end }}", ()),
        ("{{ range .Messages }}<t>{{ .Thinking }}{{ .Content }}{{ end }}", ()),
        ("{{ range .Messages }}a{{ if .Thinking }}{{ .Content }}{{ end }}b{{ end }}", (THINKING,)),
        ("{{ range $.Messages }}<t>{{ .Thinking }}</t>{{ end }}", ()),
        ("{{ range $i, $m := .Messages }}<t>{{ $m.Thinking }}</t>{{ end }}", ()),
        ("{{ range .Messages }}{{ range .ToolCalls }}<t>{{ .Thinking }}</t>{{ end }}{{ end }}", ()),
        ("<t>{{ .Thinking }}</t>", ()),
    ],
)
def test_variables_in_go(template: str, named: tuple[Capability, ...]) -> None:
    assert go_capabilities(template) == TemplateCapabilities(named)


def test_the_round_trip_in_go() -> None:
    calls = "{{ .Tools }}{{ range .Messages }}{{ .ToolCalls }}{{ end }}"
    assert not go_capabilities(calls).round_trip
    assert go_capabilities(calls + "tool_response").round_trip
    assert go_capabilities(calls + '{{ if eq .Role "tool" }}{{ end }}').round_trip
    assert not go_capabilities("{{ .Tools }}tool_response").round_trip
