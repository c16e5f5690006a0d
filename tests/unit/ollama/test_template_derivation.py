"""The Go template writes what the chat template writes, in Python and in Go's own text/template."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.go_templates import job
from transformers.utils.chat_template_utils import render_jinja_template

from kolotune import llamacpp
from kolotune.foundation.errors import TemplateError
from kolotune.foundation.reporter import PlainReporter
from kolotune.ollama.go_template_writer import go_text, write_go_template
from kolotune.ollama.modelfile import Modelfile
from kolotune.ollama.modelfile_parser import parse_modelfile
from kolotune.ollama.modelfile_writer import render_modelfile
from kolotune.ollama.stop_strings import stop_strings
from kolotune.ollama.template_derivation import NotDerivable, Obstacle, derive
from kolotune.ollama.template_proof import Render, battery
from kolotune.ollama.turn_format import Affix, Caveat, CaveatKind, TurnFormat, merge_turns

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face' }}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else "") + message['content'] | trim }}
    {{- '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
LLAMA2 = """{%- if messages[0].role == 'system' %}{% set s = messages[0].content %}
{%- set messages = messages[1:] %}
{%- else %}{% set s = none %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' }}
{%- if s is not none and loop.first %}{{ '<<SYS>>\n' + s + '\n<</SYS>>\n\n' }}{% endif %}
{{- m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
NASTY = """{%- for m in messages %}
{{- '{{ "`' + m.role + '`" }}\\\\ \t\u200d""\"\n' + m.content + '{% x %}\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '{{ "`assistant`" }}\\\\ \t\u200d""\"\n' }}{% endif %}"""
INLINE = {"SmolLM2": SMOLLM2, "Gemma3": GEMMA3, "Llama2": LLAMA2, "nasty": NASTY}

# The family's BOS token, end token, and stops.
CHATML = {"<|im_start|>", "<|im_end|>"}
LLAMA3 = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
FAMILIES: dict[str, tuple[str, str, set[str]]] = {
    "Qwen-Qwen2.5-7B-Instruct": ("", "<|im_end|>", CHATML),
    "Qwen-Qwen3-0.6B": ("", "<|im_end|>", CHATML),
    "meta-llama-Llama-3.1-8B-Instruct": ("<|begin_of_text|>", "<|eot_id|>", LLAMA3),
    "meta-llama-Llama-3.2-3B-Instruct": ("<|begin_of_text|>", "<|eot_id|>", LLAMA3),
    "meta-llama-Llama-3.3-70B-Instruct": ("<|begin_of_text|>", "<|eot_id|>", LLAMA3),
    "google-gemma-2-2b-it": ("<bos>", "<end_of_turn>", {"<start_of_turn>", "<end_of_turn>"}),
    "microsoft-Phi-3.5-mini-instruct": ("<s>", "<|end|>", {"<|end|>", "<|system|>", "<|user|>", "<|assistant|>"}),
    "mistralai-Mistral-Nemo-Instruct-2407": ("<s>", "</s>", {"</s>", "[INST]", "[/INST]"}),
    "openai-gpt-oss-120b": ("", "<|return|>", {"<|return|>", "<|start|>", "<|end|>"}),
    "SmolLM2": ("<|im_start|>", "<|im_end|>", CHATML),
    "Gemma3": ("<bos>", "<end_of_turn>", {"<start_of_turn>", "<end_of_turn>"}),
    "Llama2": ("<s>", "</s>", {"</s>", "[INST]", "[/INST]"}),
}
SPECIAL = {"<unk>", "<pad>", "<s>", "<bos>", "<|begin_of_text|>", "<|channel|>", "<|message|>", " "}.union(
    *(stops for _, _, stops in FAMILIES.values())
)
# Templates for tool calls, which fail without a list of tools, also in transformers.
NOT_DERIVABLE = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "fireworks-ai-llama-3-firefunction-v2",
}


def templates_folder() -> Path:
    """Return the folder of llama.cpp's chat templates; no fixture, because they name cases when tests are collected."""
    return llamacpp.ensure(PlainReporter()).root / "models" / "templates"


def jinja(source: str, bos: str = "<s>", eos: str = "</s>") -> Render:
    """Return the chat template as transformers renders it, always on the same day."""
    source = source.replace("strftime_now(", "'26 Jul 2024'.format(")

    def render_messages(messages: list[dict[str, Any]], open: bool) -> str:
        try:
            rendered: Any = render_jinja_template(
                [messages], chat_template=source, add_generation_prompt=open, bos_token=bos, eos_token=eos
            )
        except Exception as error:
            raise TemplateError(str(error)) from error
        return str(rendered[0][0])

    return render_messages


def source_of(name: str) -> str:
    return INLINE.get(name) or (templates_folder() / f"{name}.jinja").read_text(encoding="utf-8")


def family(name: str) -> tuple[Render, TurnFormat]:
    bos, eos, _ = FAMILIES.get(name, ("<s>", "</s>", set()))
    render_messages = jinja(source_of(name), bos, eos)
    turns = derive(render_messages, bos)
    assert isinstance(turns, TurnFormat), turns
    return render_messages, turns


def chat(*turns: str) -> list[dict[str, str]]:
    """Return a chat from "role: content" lines."""
    parts = (turn.partition(": ") for turn in turns)
    return [{"role": part[0], "content": part[2]} for part in parts]


@pytest.mark.parametrize("name", [*FAMILIES, "nasty"])
def test_families_are_proven(name: str) -> None:
    render_messages, turns = family(name)
    chats = battery(system=not turns.refuses_system)
    assert len(chats) >= 20
    for messages in chats:
        assert turns.render(messages, True) == render_messages(messages, True)


@pytest.mark.parametrize("name", FAMILIES)
def test_stops(name: str) -> None:
    _, eos, wanted = FAMILIES[name]
    _, turns = family(name)
    stops = stop_strings(turns, eos, "", SPECIAL)
    assert stops[0] == eos
    assert set(stops) == wanted
    assert len(stops) == len(wanted)
    assert stop_strings(turns, "<|endoftext|>", eos, sorted(SPECIAL))[:2] == (eos, "<|endoftext|>")


def test_all_of_llama_cpp() -> None:
    """Every template of the collection is proven, or is a known exception; a new kind of template fails here."""
    names = sorted(path.stem for path in templates_folder().glob("*.jinja"))
    assert len(names) > 60
    results = {name: derive(jinja(source_of(name)), "<s>") for name in names}
    refused = {name: result.reason for name, result in results.items() if isinstance(result, NotDerivable)}
    assert refused.keys() == NOT_DERIVABLE, refused


def test_llama3_trims_contents() -> None:
    _, turns = family("meta-llama-Llama-3.2-3B-Instruct")
    assert turns.bos == "<|begin_of_text|>"
    assert "Cutting Knowledge Date: December 2023" in turns.system.before
    assert turns.opening == turns.system.before + "<|eot_id|>"
    assert turns.later_system == Affix("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>")
    assert turns.caveats == tuple(Caveat(CaveatKind.SPACE_CHANGED, role) for role in ("system", "user", "assistant"))


def test_qwen3_leaves_thoughts_to_the_model() -> None:
    _, turns = family("Qwen-Qwen3-0.6B")
    assert turns.generation == "<|im_start|>assistant\n"
    assert turns.caveats == (Caveat(CaveatKind.THOUGHTS_CHANGED),)


def test_default_system_text() -> None:
    _, turns = family("SmolLM2")
    assert turns.bos == ""
    assert turns.render(chat("user: hi"), True).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert turns.render(chat("system: S", "user: hi"), True).startswith("<|im_start|>system\nS<|im_end|>\n")
    assert turns.caveats == ()


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("Gemma3", "first_user"),
        ("Llama2", "first_user"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "last_user"),
        ("google-gemma-2-2b-it", "first_user"),
        ("SmolLM2", "turn"),
    ],
)
def test_where_the_system_text_goes(name: str, style: str) -> None:
    assert family(name)[1].system_style == style


def test_refused_system_turns_are_a_caveat() -> None:
    _, turns = family("google-gemma-2-2b-it")
    assert turns.refuses_system
    assert turns.caveats[0] == Caveat(CaveatKind.SYSTEM_REFUSED)
    wanted = "<bos><start_of_turn>user\nS\nhi<end_of_turn>\n<start_of_turn>model\n"
    assert turns.render(chat("system: S", "user: hi"), True) == wanted


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("microsoft-Phi-3.5-mini-instruct", ""),
        ("SmolLM2", "<|im_start|>system\n<|im_end|>\n"),
        ("Llama2", "<s>[INST] <<SYS>>\n\n<</SYS>>\n\n"),
        ("google-gemma-2-2b-it", "<bos><start_of_turn>user\n\n"),
    ],
)
def test_an_empty_system_turn_is_written_as_trained(name: str, empty: str) -> None:
    render_messages, turns = family(name)
    messages = chat("system: ", "user: hi")
    text = turns.render(messages, True)
    assert text.startswith(empty) and (empty or text == turns.render(messages[1:], True))
    if not turns.refuses_system:
        assert text == render_messages(messages, True)
    assert Caveat(CaveatKind.EMPTY_SYSTEM) not in turns.caveats


def test_which_templates_write_an_empty_system_turn_otherwise() -> None:
    """Neither like any other nor as if there were none: only these of the collection, and a caveat says so.

    Their templates have tools, so from 0.30 on Ollama uses those.
    """
    names = sorted(set(path.stem for path in templates_folder().glob("*.jinja")) - NOT_DERIVABLE)
    odd = {name for name in names if Caveat(CaveatKind.EMPTY_SYSTEM) in family(name)[1].caveats}
    assert odd == {"MiniMax-M1", "poolside-Laguna-XS.2", "CohereForAI-c4ai-command-r7b-12-2024-tool_use"}


def test_ignored_system_turns_are_a_caveat() -> None:
    source = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    turns = derive(jinja(source + "{% if add_generation_prompt %}<assistant>{% endif %}"), "")
    assert isinstance(turns, TurnFormat)
    assert turns.system_style == "ignored"
    assert turns.caveats[0] == Caveat(CaveatKind.SYSTEM_IGNORED)
    assert turns.render(chat("system: S", "user: hi"), True) == "<user>hi\n<assistant>"


@pytest.mark.parametrize(
    ("source", "obstacle", "detail"),
    [
        ("{{ raise_exception('no chats today') }}", Obstacle.CHAT_REFUSED, "no chats today"),
        ("{% for m in messages %}{{ m.content|upper }}{% endfor %}", Obstacle.TEXTS_CHANGED, "user"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", Obstacle.TEXTS_CHANGED, "user"),
        ("{{ messages[-1].content }}", Obstacle.TEXTS_CHANGED, "user"),
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", Obstacle.LATER_TURNS_DIFFER, ""),
        ("{{ messages|length }}{% for m in messages %}|{{ m.content }}{% endfor %}", Obstacle.SINGLE_TURN_DIFFERS, ""),
        ("{% for m in messages %}|{{ m.content|replace('>', '&gt;') }}{% endfor %}", Obstacle.NOT_PROVEN, "&gt;"),
        ("{% for m in messages[:6] %}|{{ m.role }}{{ m.content }}{% endfor %}", Obstacle.NOT_PROVEN, "user"),
        (
            "{{ messages[0].role }}{% for m in messages if m.role != 'system' %}|{{ m.content }}{% endfor %}",
            Obstacle.SYSTEM_CHANGES_OTHERS,
            "",
        ),
    ],
)
def test_what_is_not_derivable(source: str, obstacle: Obstacle, detail: str) -> None:
    result = derive(jinja(source), "")
    assert isinstance(result, NotDerivable)
    assert result.obstacle is obstacle and detail in result.reason


def test_neighbours_of_one_role_are_merged() -> None:
    messages = chat("user: a", "user: b", "tool: x", "tool: y", "system: c", "system: d")
    assert merge_turns(messages) == chat("user: a\n\nb", "tool: x", "tool: y", "system: c\n\nd")
    assert messages[0]["content"] == "a"


def test_an_answer_at_the_end_stays_open() -> None:
    _, turns = family("SmolLM2")
    messages = chat("system: S", "user: hi", "assistant: Well,")
    text = turns.render(messages, True)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\nWell,")
    assert turns.render(messages, False) == text + "<|im_end|>\n"
    assert turns.render(messages[:2], False).endswith("hi<|im_end|>\n")


def test_go_template_is_readable() -> None:
    _, turns = family("Qwen-Qwen2.5-7B-Instruct")
    assert write_go_template(turns, False).splitlines()[1:] == [
        "{{- range $i, $m := .Messages }}",
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
        '{{- if eq $m.Role "system" }}{{ "<|im_start|>system\\n" }}{{ $m.Content }}{{ "<|im_end|>\\n" }}',
        '{{- else if eq $m.Role "user" }}{{ "<|im_start|>user\\n" }}{{ $m.Content }}{{ "<|im_end|>\\n" }}',
        '{{- else if eq $m.Role "assistant" }}{{ "<|im_start|>assistant\\n" }}{{ $m.Content }}'
        '{{ if not $last }}{{ "<|im_end|>\\n" }}{{ end }}',
        "{{- end }}",
        '{{- if and $last (ne $m.Role "assistant") }}{{ "<|im_start|>assistant\\n" }}{{ end }}',
        "{{- end }}",
    ]


def test_go_text_is_safe() -> None:
    assert go_text("") == ""
    assert go_text('{{ `"""\\\n\t\u200d\U000e0001é🙂') == (
        '{{ "{{ `\\x22\\x22\\x22\\\\\\n\\u0009\\u200d\\U000e0001é🙂" }}'
    )


@pytest.mark.parametrize("name", [*FAMILIES, "nasty"])
def test_a_modelfile_carries_the_template(name: str) -> None:
    _, turns = family(name)
    modelfile = Modelfile("./m.gguf", template=write_go_template(turns, True))
    assert parse_modelfile(render_modelfile(modelfile)) == modelfile


def test_go_renders_what_jinja_renders(go: Callable[[list[dict[str, Any]]], list[list[str]]]) -> None:
    jobs, wanted = [], []
    names = [*INLINE, *(path.stem for path in templates_folder().glob("*.jinja"))]
    for name in sorted(set(names) - NOT_DERIVABLE):
        render_messages, turns = family(name)
        chats = battery(system=not turns.refuses_system)
        texts = [render_messages(messages, True) for messages in chats]
        jobs += [job(write_go_template(turns, True), chats), job(write_go_template(turns, False), chats)]
        wanted += [texts, [text.removeprefix(turns.bos) for text in texts]]
    for task, got, right in zip(jobs, go(jobs), wanted, strict=True):
        assert got == right, task["Template"]


def test_go_renders_any_chat_as_the_proof_does(go: Callable[[list[dict[str, Any]]], list[list[str]]]) -> None:
    """Include what else servers send: neighbours of one role, answers to be continued, no user turn at all."""
    chance = random.Random(0)
    roles, contents = ("system", "user", "assistant", "tool"), ("", "a", "{{ .System }}", "two\n lines ")
    chats = [
        [{"role": chance.choice(roles), "content": chance.choice(contents)} for _ in range(length)]
        for length in (0, 1, 1, 1, 2, 2, 2, 3, 3, 3, *range(4, 12)) * 5
    ]
    formats = [family(name)[1] for name in [*FAMILIES, "nasty", "Apertus-8B-Instruct"]]
    for turns, texts in zip(
        formats, go([job(write_go_template(turns, True), chats) for turns in formats]), strict=True
    ):
        for messages, text in zip(chats, texts, strict=True):
            assert text == turns.render(messages, True), (messages, turns)
