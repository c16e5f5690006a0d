"""A Modelfile's TEMPLATE is rendered as Go's own text/template renders it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import observed
from support.go_templates import job
from support.observed import OBSERVED, ObservedModel
from transformers.utils.chat_template_utils import render_jinja_template

from kolotune.foundation.errors import ArtifactError, TemplateError
from kolotune.ollama.go_template_renderer import render_go_template
from kolotune.ollama.go_template_writer import write_go_template
from kolotune.ollama.go_values import Request
from kolotune.ollama.template_derivation import NotDerivable, derive
from kolotune.ollama.template_proof import battery

Go = Callable[[list[dict[str, Any]]], list[list[str]]]
CHATS = battery(system=True)
# As people write them by hand, and as Ollama's library has them.
BY_HAND = [
    """{{- range .Messages }}<|{{ .Role }}|>
{{ .Content }}<|end|>
{{ end }}<|assistant|>
""",
    """{{ if .System }}<s>{{ .System }}</s>{{ end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if eq .Role "user" }}U: {{ .Content }}
{{ else if eq .Role "assistant" }}A: {{ .Content }}{{ if not $last }}</s>{{ end }}
{{ else if eq .Role "system" "tool" }}S{{ else }}?{{ end }}
{{- if and (ne .Role "assistant") $last }}A: {{ end }}
{{- end }}""",
    "{{ $n := 0 }}{{ range .Messages }}{{ $n = len .Content }}{{ $n }}, {{ end }}{{ $n }} {{ `raw \\n {{ x }}` }}",
    "{{ range $i, $m := .Messages }}{{ if or (gt $i 1) (lt $i 1) }}{{ $i }}{{ with_ }}{{ end }}{{ end }}".replace(
        "{{ with_ }}", '{{ "\\u00e9\\x41\\"}}" }}'
    ),
    "{{/* no */}}a  {{- /* no */ -}}  b{{ range .Messages }}{{ else }}none{{ end }}{{ (index .Messages 0).Content }}",
    "{{ range .Messages }}{{ if true }}{{ print .Role 1 }}{{ end }}{{ $.System }}{{ end }}",
]


def derived(templates: Path) -> list[str]:
    """Return the Go templates of all chat templates in a folder."""
    go_templates = []
    for path in sorted(templates.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")

        def write(messages: list[dict[str, Any]], opened: bool, source: str = source) -> str:
            try:
                texts, _ = render_jinja_template(
                    [messages], chat_template=source, add_generation_prompt=opened, bos_token="<s>", eos_token="</s>"
                )
            except Exception as error:  # whatever a template raises
                raise TemplateError(str(error)) from None
            return str(texts[0])

        turns = derive(write, "<s>")
        if not isinstance(turns, NotDerivable):
            go_templates += [write_go_template(turns, include_bos) for include_bos in (True, False)]
    return go_templates


def test_templates_are_rendered_as_by_go(go: Go, templates_folder: Path) -> None:
    templates = list(dict.fromkeys([*BY_HAND, *derived(templates_folder)]))
    assert len(templates) > 30
    for template, texts in zip(templates, go([job(template, CHATS) for template in templates]), strict=True):
        for chat, text in zip(CHATS, texts, strict=True):
            assert render_go_template(template, chat) == text, template


def test_the_modelfiles_system_prompt_is_used_where_a_chat_has_none() -> None:
    template = "{{ .System }}|{{ range .Messages }}{{ .Role }} {{ end }}"
    assert render_go_template(template, [{"role": "user", "content": "a"}], "S") == "S|system user "
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]
    assert render_go_template(template, own, "S") == "own|system user "


@pytest.mark.parametrize(
    "template",
    [
        "{{ .Prompt }}", "{{ range .Messages }}", "{{ range .Messages }}{{ end }}{{ end }}",
        "{{ range .Messages }}{{ else if true }}{{ end }}", "{{ if .Messages }}{{ else }}{{ else }}{{ end }}",
        "{{ .Messages", '{{ template "x" .Messages }}', "{{ json .Messages }}",
        "{{ range $m := .Messages }}{{ $x }}{{ end }}", "{{ .Messages | len }}",
        "{{ range .Messages }}{{ .Role.Name }}{{ end }}", "{{ index .Messages 99 }}",
        "{{ range .System }}{{ end }}{{ .Messages }}",
    ],
)  # fmt: skip
def test_unsupported_templates_are_refused(template: str) -> None:
    with pytest.raises(ArtifactError, match="TEMPLATE"):
        render_go_template(template, [{"role": "user", "content": "a"}])


GO_ROWS = [
    pytest.param(model, name, id=f"{model.name}: {name}")
    for model in OBSERVED
    if model.shows != "gguf"
    for name, prompt in model.prompts.items()
    if isinstance(prompt, str)
]


@pytest.mark.parametrize(("model", "name"), GO_ROWS)
def test_prompts_of_a_real_ollama(model: ObservedModel, name: str) -> None:
    chat = observed.CHATS[name]
    think = chat.get("think", True if "thinking" in model.capabilities else None)
    request = Request(chat.get("tools", ()), think)
    assert render_go_template(model.shown_template, chat["messages"], None, request) == model.prompts[name]


TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {
            "properties": {
                "z": {"description": "<last>", "type": ["string", "null"], "default": 1},
                "a": {"type": "array", "items": {"type": "string", "minLength": 1}},
                "m": {"enum": ["x", 2, 1e21, {"b": 1, "a": 0.5}], "anyOf": [{"type": "integer"}, {"type": ["number"]}]},
                "o": {"type": "object", "properties": {"p": {"type": "boolean"}}, "required": ["p"]},
            },
            "required": ["a"],
            "additionalProperties": False,
            "type": "object",
        },
        "strict": True,
    },
}
ASKING: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "user", "content": "two & <three>"},
        {
            "role": "assistant",
            "content": "",
            "thinking": "so",
            "tool_calls": [{"id": "i", "function": {"name": "find", "arguments": {"z": 1.0, "a": ["<", None, True]}}}],
        },
        {"role": "tool", "content": "r", "tool_name": "find"},
        {"role": "tool", "content": "s"},
    ],
    "tools": [TOOL, {"type": "function", "function": {"name": "none", "description": "d"}}],
}
WITH_TOOLS = [
    "{{ range .Messages }}{{ end }}"
    "{{ json .Tools }}|{{ .Tools }}|{{ range .Tools }}{{ . }}{{ json .Function }}{{ end }}",
    """{{- range .Tools }}{{ .Function.Name }} ({{ .Function.Description }}): {{ .Function.Parameters.Properties }}
{{- range $name, $property := .Function.Parameters.Properties }}
- {{ $name }}: {{ $property.Type }} {{ $property.Description }} {{ json $property.Enum }}
{{- end }}{{ end }}{{ range .Messages }}{{ end }}""",
    """{{ range .Messages }}{{ .Role }} {{ .ToolName }} {{ if .Thinking }}({{ .Thinking }}){{ end }}
{{- range .ToolCalls }}{{ .Function.Name }} {{ .Function.Arguments }} {{ json .Function }} {{ len .Function.Arguments }}
{{- range $name, $value := .Function.Arguments }}{{ $name }}={{ json $value }}{{ end }}{{ end }}{{ end }}""",
    '{{ range .Messages }}{{ if eq .Role "user" }}{{ continue }}{{ end }}{{ .Role }}{{ end }}'
    "{{ range .Tools }}{{ .Function.Name }}{{ break }}{{ else }}none{{ end }}",
    "{{ .Think }} {{ .IsThinkSet }} {{ if and .IsThinkSet (not .Think) }}off{{ end }}{{ range .Messages }}{{ end }}",
]


@pytest.mark.parametrize("template", WITH_TOOLS)
def test_tools_and_thoughts_are_rendered_as_by_go(go: Go, template: str) -> None:
    for think in (None, True, False):
        (texts,) = go([{"Template": template, "Chats": [{**ASKING, "think": think}]}])
        request = Request(ASKING["tools"], think)
        assert [render_go_template(template, ASKING["messages"], None, request)] == texts


def test_observed_prompts_are_those_of_go(go: Go) -> None:
    """So that what stands for Ollama in other tests renders as Ollama does."""
    rows = [param.values for param in GO_ROWS]
    for model in {id(model): model for model, _ in rows}.values():
        names = [name for other, name in rows if other is model]
        thinks = "thinking" in model.capabilities
        chats = [{**({"think": True} if thinks else {}), **observed.CHATS[name]} for name in names]
        assert go([{"Template": model.shown_template, "Chats": chats}]) == [[model.prompts[name] for name in names]]
