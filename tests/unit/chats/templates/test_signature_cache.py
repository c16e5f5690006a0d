"""A chat rendered by its signature equals the real rendering, and templates that inspect texts have no signature."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masking import CHATML, CHATML_SPECIAL, CHATS, FAMILIES, SYSTEM_CHATS, chat, locate, template_of

from kolotune.chats import Chat, Message
from kolotune.chats.templates.loss_mask import AnswerLocator
from kolotune.chats.templates.signature_cache import SignatureCache
from kolotune.chats.templates.template import ChatTemplate
from kolotune.foundation.errors import TemplateError

_TRIMMED = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
_ADDED = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}", "{{ '<|im_start|>' + m.role + '\n' + m['content'] }}"
)
_TYPED = CHATML.replace("{{ m.content }}", "{% if m.content is string %}{{ m.content.strip() }}{% endif %}")
_PASSING_ON = {"written": CHATML, "trimmed": _TRIMMED, "added": _ADDED, "of a kind": _TYPED}
_CONTENT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t<|>ab")), max_size=20)


def _cache(template: ChatTemplate, special: tuple[str, ...] = CHATML_SPECIAL) -> SignatureCache:
    return SignatureCache(AnswerLocator(template, special), frozenset(special), frozenset())


def _is_same(sample: Chat, cache: SignatureCache, template: ChatTemplate, special: tuple[str, ...]) -> bool:
    """Return whether a chat has a signature; check that the signature then gives what rendering gives."""
    signed = cache.render(sample)
    if signed is None:
        return False
    located = locate(sample, template, special)
    assert (signed.text, signed.spans) == (located.text, located.spans)
    assert "".join(signed.parts) == signed.text and set(signed.parts[1::2]) <= set(special)
    return True


@pytest.mark.parametrize("jinja", _PASSING_ON.values(), ids=_PASSING_ON.keys())
@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(_CONTENT, _CONTENT), min_size=1, max_size=3), system=st.none() | _CONTENT)
def test_a_signature_gives_what_rendering_gives(jinja: str, pairs: list[tuple[str, str]], system: str | None) -> None:
    template = ChatTemplate(jinja, {})
    cache = _cache(template)
    sample = chat(*pairs, system=system)
    plain = all(message.content.strip() for message in sample.messages)
    if any(token in message.content for message in sample.messages for token in (*CHATML_SPECIAL, "</think>")):
        return
    assert (_is_same(sample, cache, template, CHATML_SPECIAL) if plain else cache.render(sample) is not None) == plain


@pytest.mark.parametrize("name", FAMILIES)
def test_real_templates(name: str, templates_folder: Path) -> None:
    family = FAMILIES[name]
    template = template_of(family, templates_folder)
    cache = _cache(template, family.special)
    for sample in [*CHATS, chat(*[("q", "a")] * 3), *(SYSTEM_CHATS if family.system else [])]:
        _is_same(sample, cache, template, family.special)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1", "llama3.2", "llama3.3", "gemma2"])
def test_these_templates_only_pass_texts_on(name: str, templates_folder: Path) -> None:
    family = FAMILIES[name]
    template = template_of(family, templates_folder)
    assert _is_same(chat(("q", "a"), ("q", "a")), _cache(template, family.special), template, family.special)


_INSPECTING = {
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
    "trimmed of letters": "{{ m.content.strip('x') }}",
    "trimmed together": "{{ (m.content + 'x ') | trim }}",
}


@pytest.mark.parametrize("written", _INSPECTING.values(), ids=_INSPECTING.keys())
def test_a_template_that_inspects_a_text_has_no_signature(written: str) -> None:
    template = ChatTemplate(CHATML.replace("{{ m.content }}", written), {})
    assert "q" in template.render([{"role": "user", "content": "q"}]).lower()  # it can be rendered
    assert _cache(template).render(chat(("q", "a"))) is None


def test_chats_with_more_than_plain_texts_have_no_signature() -> None:
    template = ChatTemplate(CHATML, {})
    cache = _cache(template)
    user = Message("user", "q")
    assert _is_same(chat(("q", "a")), cache, template, CHATML_SPECIAL)
    for text in ("<|im_end|>", "a<|endoftext|>b", "<think>x</think>a"):
        assert cache.render(chat(("q", text))) is None
    assert cache.render(chat(("q", "a"), system=" ")) is None
    assert cache.render(Chat((user, Message("assistant", "a", reasoning="r")))) is None
    assert cache.render(Chat((user, Message("assistant", "a")), tools=({"name": "t"},))) is None
    with pytest.raises(TemplateError):
        ChatTemplate("{{ raise_exception('no') }}", {}).signature(["user"], prompt=False)
