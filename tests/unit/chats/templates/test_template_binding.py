"""Binding the variables that servers know and training does not."""

from __future__ import annotations

import datetime
import random
from pathlib import Path
from typing import Any

import pytest

from kolotune.chats.templates import sandbox
from kolotune.chats.templates.frozen_date import freeze_date
from kolotune.chats.templates.template_binding import bind, switches_of
from kolotune.foundation.errors import ConfigError, TemplateError
from kolotune.ollama.template_capabilities import jinja_capabilities

DATE = datetime.date(2026, 3, 5)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<▁pad▁>"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "Hi"}
# What servers hand to templates, and what clients are known to send.
SERVED = (
    "date_string", "datetime", "current_date", "current_time", "enable_thinking", "thinking", "documents",
    "builtin_tools", "custom_tools", "tools_in_user_message", "model_identity", "reasoning_effort", "add_vision_id",
    "keep_past_thinking", "preserve_thinking", "clear_thinking", "truncate_history_thinking", "drop_thinking",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    True, False, None, "", "on", "low", "2026-01-01", 0, 3, 1.5, [], ["a"], [{"name": "a"}], {}, {"a": 1},
)  # fmt: skip


REFUSED = "refused"


def render(source: str, tools: Any = None, **variables: object) -> str:
    """Render a question; a refusal is one text."""
    try:
        return sandbox.render(source, [USER], tools, {**TOKENS, "add_generation_prompt": True, **variables})
    except TemplateError:
        return REFUSED


EMPTY = ["mood = {}.undefined", "zoo = {}.undefined"]


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("{% if thinking %}a{% endif %}", ["thinking = {}.undefined"]),
        ("{{ 'It is ' + datetime }}{{ zoo }}{{ mood | trim }}", ['datetime = "Mar 05 2026"', *EMPTY]),
        ("{{ 'Use ' + functions }}", ['functions = ""']),
        ("{{ 'Use ' + messages }}{{ functions }}", ["functions = {}.undefined"]),
        ("{{ zoo }}{{ date_string }}", ["date_string = {}.undefined", "zoo = {}.undefined"]),
        ("{% if documents is none %}a{% endif %}", ["documents = none"]),
        ("{{ pad_token }}{{ unk_token }}", ['pad_token = "<▁pad▁>"', "unk_token = {}.undefined"]),
        ("{% if tools is defined %}a{% endif %}", ["tools = tools or none"]),
        ("{% for tool in tools %}a{% endfor %}", ["tools = tools or {}.undefined"]),
        ("\n  {%- if items %}a{% endif %}", ["items = {}.undefined"]),
        ("\n\n  text {{ x }}\r\n", ["x = {}.undefined"]),
        ("   {% if x %}a{% endif %}\n b", ["x = {}.undefined"]),
    ],
)
def test_each_variable_gets_a_line_and_the_rest_stays(source: str, lines: list[str]) -> None:
    bound = bind(source, DATE, TOKENS)
    assert bound == "".join(f"{{% set {line} %}}\n" for line in lines) + source
    if render(source) != REFUSED:
        assert render(bound) == render(source)
    assert bind(bound, DATE, TOKENS) == bound  # a tuned model may be the base of the next one


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages }}{{ bos_token }}{{ eos_token }}",
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}a{% endif %}",
        "{# {{ thinking }} #} {{ 'thinking' }} {{ messages[0].thinking }}\r\n",
        "{% for thinking in messages %}{{ thinking.content }}{% endfor %}",
    ],
)
def test_a_template_without_such_variables_stays_as_it_is(source: str) -> None:
    assert bind(source, DATE, TOKENS) == source


def test_a_token_that_the_tokenizer_does_not_have_is_bound() -> None:
    """A GGUF may name one all the same."""
    bound = bind("{{ bos_token }}{{ messages[0].content }}", DATE, {})
    assert sandbox.render(bound, [USER], None, {"bos_token": "<|endoftext|>"}) == "Hi"


def test_a_token_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(TemplateError, match="can't be written"):
        bind("{{ pad_token }}", DATE, {"pad_token": "a\\n"})


def test_the_date_is_frozen_too() -> None:
    bound = bind("{{ strftime_now('%Y') }}{{ date_string }}", DATE, TOKENS)
    assert bound == "{% set date_string = {}.undefined %}\n{{ '2026' }}{{ date_string }}"


def test_tools_render_alike_whatever_stands_for_none() -> None:
    bound = bind("{% if tools is not none %}tools{% elif tools is defined %}none{% else %}absent{% endif %}", DATE, {})
    assert render(bound) == "none"
    assert render("{% set tools = [] %}" + bound) == render("{% set tools = {}.undefined %}" + bound) == "none"
    assert render(bound, TOOLS) == "tools"


SWITCH = "{% set enable_thinking = true if enable_thinking else false %}\n"


def test_a_switch_stays_free_as_true_or_false() -> None:
    source = "{{ enable_thinking }}{{ thinking }}"
    bound = bind(source, DATE, TOKENS, ("enable_thinking",))
    assert bound == "{% set thinking = {}.undefined %}\n" + SWITCH + source
    assert {render(bound, thinking=1, enable_thinking=value) for value in VALUES} == {"True", "False"}
    assert render(bound) == "False" and render(bound, enable_thinking=True) == "True"
    assert switches_of(bound) == ("enable_thinking",) and switches_of(source) == ()


def test_a_template_with_a_switch_is_the_base_of_the_next_model() -> None:
    bound = bind("{{ enable_thinking }}", DATE, TOKENS, ("enable_thinking",))
    assert bind(bound, DATE, TOKENS, ("enable_thinking",)) == bound
    closed = bind(bound, DATE, TOKENS)
    assert render(closed, enable_thinking=True) == "False" and switches_of(closed) == ()


@pytest.mark.parametrize(
    ("source", "hint"),
    [("{{ thinking }}{{ mode }}{{ bos_token }}", "mode, thinking"), ("{{ messages }}", "none")],
)
def test_a_switch_that_the_template_does_not_have_is_refused(source: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="enable_thinking") as caught:
        bind(source, DATE, TOKENS, ("enable_thinking",))
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("source", ["{{ strftime_now(x) }}", "{% if %}"])
def test_what_cannot_be_bound_is_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        bind(source, DATE, TOKENS)


@pytest.mark.parametrize(
    ("outer", "expected"),
    [
        ("{% set a = {}.undefined %}\n\n x {{ a }}", True),
        ("{% set a = {}.undefined %}\n x {{ a }}", False),
        ("{% set a = {}.undefined %}\n\n x  {{ a }}", False),
        ("{% set b = {}.undefined %}\n\n x {{ a }}", False),
        ("{{ a }}\n\n x {{ a }}", False),
        ("{% set a = {}.undefined %}\n{# c #}\n x {{ a }}", False),
    ],
)
def test_one_template_is_another_behind_lines_that_set_variables(outer: str, expected: bool) -> None:
    assert sandbox.extends(outer, "\n x {{ a }}", ["a"]) is expected


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "meta-llama-Llama-3.1-8B-Instruct", "google-gemma-2-2b-it"])
def test_a_public_template_renders_as_in_training_for_all_values_of_servers(name: str, templates_folder: Path) -> None:
    check_binding(templates_folder / f"{name}.jinja", random.Random(0))


@pytest.mark.slow
def test_all_public_templates_render_as_in_training(templates_folder: Path) -> None:
    chance = random.Random(0)
    are_bound = [check_binding(path, chance) for path in sorted(templates_folder.glob("*.jinja"))]
    assert are_bound.count(True) > 20 and are_bound.count(False) > 5


def check_binding(path: Path, chance: random.Random) -> bool:
    """Check the renderings of a template for random values of servers; return whether it had to be bound."""
    source = freeze_date(path.read_text(encoding="utf-8"), DATE)
    bound = bind(source, DATE, TOKENS)
    assert bound.endswith(source)
    assert jinja_capabilities(bound) == jinja_capabilities(source), "Ollama finds the same words"
    names = set(sandbox.free_variables(source)) | set(SERVED)
    names -= {"messages", "tools", "add_generation_prompt", *TOKENS}
    for tools in (None, TOOLS):
        trained = render(bound, tools)
        # Templates that refuse without a variable (tools, or one of their own) are bound to a value that they render.
        assert render(source, tools) in (trained, REFUSED), path.name
        for _ in range(4):
            served = {name: chance.choice(VALUES) for name in names}
            documents = f"{{% set documents = {served.pop('documents')!r} %}}"
            assert render(documents + bound, tools, **served) == trained, (path.name, served, documents)
    return bound != source
