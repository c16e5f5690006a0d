"""Which variables a template reads before it has set them."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kolotune.chats.templates import sandbox
from kolotune.foundation.errors import TemplateError


@pytest.mark.parametrize(
    ("source", "free"),
    [
        ("{{ a }}{# b #} c", "a"),
        ("{% set a = b %}{{ a }}", "b"),
        ("{{ a }}{% set a = 1 %}", "a"),
        ("{% set a = a or 1 %}{{ a }}", "a"),
        ("{% if a %}{% set b = 1 %}{% else %}{% set b = 2 %}{% endif %}{{ b }}", "a"),
        ("{% if a %}{% set b = 1 %}{% elif c %}{% set b = 2 %}{% else %}{% set b = 2 %}{% endif %}{{ b }}", "a c"),
        ("{% if a %}{% set b = 1 %}{% elif c %}{% set b = 2 %}{% endif %}{{ b }}", "a b c"),
        ("{% if a %}{% set b = 1 %}{% else %}{{ raise_exception('no') }}{% endif %}{{ b }}", "a"),
        ("{% for a in b if a.c %}{{ a }}{{ loop.first }}{% set d = 1 %}{% endfor %}{{ a }}{{ d }}", "a b d"),
        ("{% for a in [1] %}{{ e }}{% set e = 1 %}{% else %}{{ a }}{% endfor %}", "a e"),
        ("{% for a in [1] %}{% if a %}{% continue %}{% else %}{% set b = 1 %}{% endif %}{{ b }}{% endfor %}", ""),
        ("{% macro m(a, b=c) %}{{ a ~ b ~ d ~ caller }}{{ n() }}{% endmacro %}{% macro n() %}{% endmacro %}", "c d"),
        ("{% macro m() %}{{ caller() }}{% endmacro %}{% call(a) m() %}{{ a }}{{ b }}{% endcall %}{{ a }}", "a b"),
        ("{% set a %}{% set b = 1 %}{{ c }}{% endset %}{{ a }}{{ b }}", "b c"),
        ("{% filter trim %}{% set b = 1 %}{% endfilter %}{{ b }}", "b"),
        ("{% with a = b %}{{ a }}{% endwith %}{{ a }}", "a b"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = x %}{{ ns.a }}{% set other.a = 1 %}", "other x"),
        ("{{ range(3) | length }}{{ dict(a=1) }}{{ strftime_now('%Y') }}{{ [true, none] }}", ""),
        ("{% set a, b = c %}{{ a }}{{ b }}", "c"),
        ("{% generation %}{{ a }}{% endgeneration %}", "a"),
    ],
)
def test_what_may_be_read_before_it_is_set(source: str, free: str) -> None:
    assert sandbox.free_variables(source) == free.split()


def test_no_variable_is_found_that_jinja2_would_not_look_up(templates_folder: Path) -> None:
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    checked = 0
    for path in sorted(templates_folder.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        if "{% generation" not in source and "{%- generation" not in source:
            found = set(sandbox.free_variables(source))
            # One that the top level sets later counts if a macro reads it: the macro may be called before.
            assert found - meta.find_undeclared_variables(environment.parse(source)) <= {"add_tokens"}, path.name
            checked += 1
    assert checked > 30


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if tools %}{% for t in tools %}{{ t }}{% endfor %}{{ tools | tojson }}{{ tools[0] }}{% endif %}", False),
        ("{% if messages and tools and not tools %}a{% endif %}", False),
        ("{% if tools is defined %}a{% endif %}", True),
        ("{% if a and tools is not none %}a{% endif %}", True),
        ("{% if tools == none %}a{% endif %}", True),
        ("{{ tools | length }}", True),
        ("{% set t = tools %}", True),
        ("{% set t = tools or custom_tools %}", True),
        ("{{ m(tools) }}", True),
        ("{{ tools if a else b }}", True),
        ("{{ a if tools else b }}", False),
        ("{{ tools }}", True),
    ],
)  # fmt: skip
def test_a_template_that_treats_no_tools_in_two_ways(source: str, expected: bool) -> None:
    assert sandbox.inspects(source, "tools") is expected


def test_what_is_no_template_is_refused() -> None:
    with pytest.raises(TemplateError, match="is not valid Jinja"):
        sandbox.free_variables("{% if %}")
