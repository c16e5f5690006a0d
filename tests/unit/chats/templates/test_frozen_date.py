"""Freezing the date that a template asks for."""

from __future__ import annotations

import datetime
import locale
from pathlib import Path

import pytest

from kolotune.chats.templates.frozen_date import depends_on_date, freeze_date
from kolotune.chats.templates.template import ChatTemplate
from kolotune.foundation.errors import TemplateError

DATE = datetime.date(2026, 3, 5)
USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("source", "frozen"),
    [
        ('{{ strftime_now("%d %b %Y") }}', '{{ "05 Mar 2026" }}'),
        ("{{ strftime_now('%B %-d, %Y') }}", "{{ 'March 5, 2026' }}"),
        ('{{ strftime_now(format="%Y-%m-%d") }}', '{{ "2026-03-05" }}'),
        ("{{- strftime_now ( '%A' ) | upper -}}", "{{- 'Thursday' | upper -}}"),
        ("{% if strftime_now is defined %}a{% endif %}", "{% if true %}a{% endif %}"),
        ("{% if strftime_now is not defined %}a{% endif %}", "{% if false %}a{% endif %}"),
        ("{% if strftime_now is undefined %}a{% endif %}", "{% if false %}a{% endif %}"),
        ("{# strftime_now('%Y') #}{{ strftime_now('%Y') }}", "{# strftime_now('%Y') #}{{ '2026' }}"),
        ("{{ strftime_now('it\\'s %H:%M, 100%%') }}", "{{ 'it\\'s 00:00, 100%' }}"),
    ],
)
def test_a_date_becomes_a_literal(source: str, frozen: str) -> None:
    assert depends_on_date(source)
    assert freeze_date(source, DATE) == frozen
    assert not depends_on_date(frozen)
    ChatTemplate(frozen, {}).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages }}",
        "strftime_now('%Y') as plain text",
        "{# strftime_now('%Y') #}{{ messages }}\r\n",
        "{{ 'strftime_now(\"%Y\")' }}",
    ],
)
def test_other_templates_stay_byte_for_byte(source: str) -> None:
    assert not depends_on_date(source)
    assert freeze_date(source, DATE) is source


@pytest.mark.parametrize(
    "source",
    [
        "{% set f = '%Y' %}{{ strftime_now(f) }}",
        "{{ strftime_now('%Y' ~ '-%m') }}",
        "{% set now = strftime_now %}{{ now('%Y') }}",
        "{{ strftime_now('%Q') }}",
        "{{ strftime_now('%Y') }} strftime_now('%Y') in the text",
    ],
)
def test_a_date_that_cannot_be_fixed_is_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        freeze_date(source, DATE)


def test_names_are_english_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = locale.setlocale(locale.LC_TIME)
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C"):
        try:
            locale.setlocale(locale.LC_TIME, name)
        except locale.Error:
            continue
        try:
            assert freeze_date("{{ strftime_now('%a %A %b %B') }}", DATE) == "{{ 'Thu Thursday Mar March' }}"
        finally:
            locale.setlocale(locale.LC_TIME, saved)


def test_frozen_equals_strftime_on_that_day() -> None:
    english = locale.setlocale(locale.LC_TIME)
    if not english.startswith(("C", "en", "POSIX")):
        pytest.skip("strftime is not English here")
    pattern = "%a %A %b %B %d %m %y %Y %j %H %M %S %I %p %u %w %%"
    for day in (datetime.date(2026, 1, 1), datetime.date(1999, 12, 31), datetime.date(2028, 2, 29)):
        assert freeze_date("{{ strftime_now('" + pattern + "') }}", day) == "{{ '" + day.strftime(pattern) + "' }}"


def test_real_templates_are_frozen(templates_folder: Path) -> None:
    dated = []
    for path in sorted(templates_folder.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        frozen = freeze_date(source, DATE)
        assert not depends_on_date(frozen)
        if frozen != source:
            dated.append(path.name)
    assert "meta-llama-Llama-3.2-3B-Instruct.jinja" in dated
    assert "Qwen-Qwen3-0.6B.jinja" not in dated
    source = (templates_folder / "meta-llama-Llama-3.2-3B-Instruct.jinja").read_text(encoding="utf-8")
    text = ChatTemplate(freeze_date(source, DATE), {"bos_token": "<|begin_of_text|>"}).render([USER])
    assert text.startswith("<|begin_of_text|>") and "Today Date: 05 Mar 2026\n" in text
