"""Chats that are not rendered must be what rendering makes of them, and templates that look into texts must be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masking import CHATML, CHATML_SPECIAL, CHATS, FAMILIES, SYSTEM_CHATS, chat, template_of

from kolotune.chats import Chat, Message
from kolotune.chats.templates.loss_mask import locate
from kolotune.chats.templates.signatures import Forms
from kolotune.chats.templates.template import ChatTemplate
from kolotune.foundation.errors import TemplateError

_TRIMMED = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
_ADDED = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}", "{{ '<|im_start|>' + m.role + '\n' + m['content'] }}"
)
_TYPED = CHATML.replace("{{ m.content }}", "{% if m.content is string %}{{ m.content.strip() }}{% endif %}")
_PASSING_ON = {"written": CHATML, "trimmed": _TRIMMED, "added": _ADDED, "of a kind": _TYPED}
_CONTENT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t<|>ab")), max_size=20)


def _forms(jinja: str) -> tuple[Forms, ChatTemplate]:
    template = ChatTemplate(jinja, {})
    return Forms(template, frozenset(CHATML_SPECIAL), frozenset()), template


def _same(each: Chat, forms: Forms, template: ChatTemplate, special: tuple[str, ...]) -> bool:
    """Whether a chat had a form; it must then be placed as rendering places it."""
    placed = forms.place(each)
    if placed is None:
        return False
    located = locate(each, template, special)
    assert (placed.text, tuple(placed.spans)) == (located.text, located.spans)
    assert tuple(placed.turn_starts) == located.turn_starts
    assert "".join(placed.parts) == placed.text and set(placed.parts[1::2]) <= set(special)
    return True


@pytest.mark.parametrize("jinja", _PASSING_ON.values(), ids=_PASSING_ON.keys())
@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(_CONTENT, _CONTENT), min_size=1, max_size=3), system=st.none() | _CONTENT)
def test_a_form_places_a_chat_as_rendering_does(jinja: str, pairs: list[tuple[str, str]], system: str | None) -> None:
    forms, template = _forms(jinja)
    each = chat(*pairs, system=system)
    plain = all(message.content.strip() for message in each.messages)
    if any(token in message.content for message in each.messages for token in (*CHATML_SPECIAL, "</think>")):
        return
    assert (_same(each, forms, template, CHATML_SPECIAL) if plain else forms.place(each) is not None) == plain


@pytest.mark.parametrize("name", FAMILIES)
def test_real_templates(name: str, templates_folder: Path) -> None:
    family = FAMILIES[name]
    template = template_of(family, templates_folder)
    forms = Forms(template, frozenset(family.special), frozenset())
    for each in [*CHATS, chat(*[("q", "a")] * 3), *(SYSTEM_CHATS if family.system else [])]:
        _same(each, forms, template, family.special)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1", "llama3.2", "llama3.3", "gemma2"])
def test_these_templates_only_pass_texts_on(name: str, templates_folder: Path) -> None:
    family = FAMILIES[name]
    template = template_of(family, templates_folder)
    assert _same(
        chat(("q", "a"), ("q", "a")), Forms(template, frozenset(family.special), frozenset()), template, family.special
    )


_LOOKING_IN = {
    "in": "{% if 'x' in m.content %}!{% endif %}{{ m.content }}",
    "in a text": "{% if m.content in 'abc' %}!{% endif %}{{ m.content }}",
    "equals": "{% if m.content == 'x' %}!{% endif %}{{ m.content }}",
    "one of": "{% if m.content in ['x'] %}!{% endif %}{{ m.content }}",
    "key": "{{ {'x': 'y'}.get(m.content, '') }}{{ m.content }}",
    "length": "{% if m.content | length > 3 %}!{% endif %}{{ m.content }}",
    "begins": "{% if m.content.startswith('x') %}!{% endif %}{{ m.content }}",
    "slice": "{% if m.content[0] == 'x' %}!{% endif %}{{ m.content }}",
    "upper": "{{ m.content | upper }}",
    "is upper": "{% if m.content is upper %}!{% endif %}{{ m.content }}",
    "replace": "{{ m.content.replace('x', 'y') }}",
    "split": "{{ m.content.split('</think>')[-1] }}",
    "json": "{{ m.content | tojson }}",
    "number": "{% if m.content | int(0) > 1 %}!{% endif %}{{ m.content }}",
    "format": "{{ '%s' % m.content }}",
    "tilde": "{{ m.content ~ '' }}",
    "set": "{% set c %}{{ m.content }}{% endset %}{% if 'x' in c %}!{% endif %}{{ c }}",
    "macro": "{% macro w(c) %}{{ c }}{% endmacro %}{% if 'x' in w(m.content) %}!{% endif %}{{ m.content }}",
    "filter": "{% filter upper %}{{ m.content }}{% endfilter %}",
    "escape": "{% autoescape true %}{{ m.content }}{% endautoescape %}",
    "each": "{% for c in m.content %}{{ c }}{% endfor %}",
    "joined": "{{ [m.content, 'x'] | join }}",
    "trimmed otherwise": "{{ m.content.strip('x') }}",
    "trimmed together": "{{ (m.content + 'x ') | trim }}",
}


@pytest.mark.parametrize("written", _LOOKING_IN.values(), ids=_LOOKING_IN.keys())
def test_a_template_that_does_more_with_a_text_has_no_form(written: str) -> None:
    forms, template = _forms(CHATML.replace("{{ m.content }}", written))
    assert "q" in template.render([{"role": "user", "content": "q"}]).lower()  # it can be rendered
    assert forms.place(chat(("q", "a"))) is None


def test_texts_that_are_more_than_texts_have_no_form() -> None:
    forms, template = _forms(CHATML)
    user = Message("user", "q")
    assert _same(chat(("q", "a")), forms, template, CHATML_SPECIAL)
    for text in ("<|im_end|>", "a<|endoftext|>b", "<think>x</think>a"):
        assert forms.place(chat(("q", text))) is None
    assert forms.place(chat(("q", "a"), system=" ")) is None
    assert forms.place(Chat((user, Message("assistant", "a", reasoning="r")))) is None
    assert forms.place(Chat((user, Message("assistant", "a")), tools=({"name": "t"},))) is None
    with pytest.raises(TemplateError):
        ChatTemplate("{{ raise_exception('no') }}", {}).around(["user"], prompt=False)
