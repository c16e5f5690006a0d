"""Freezing the date, and rendering as transformers does."""

from __future__ import annotations

import datetime
import locale
from pathlib import Path

import pytest

from kolotune.chats import Chat, Message
from kolotune.chats.templates.frozen_date import depends_on_date, freeze_date
from kolotune.chats.templates.rendering import Rendering
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


def test_rendering_is_that_of_transformers(templates_folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tools = [{"type": "function", "function": {"name": "f", "description": "ü <b>", "parameters": {"a": 1}}}]
    messages = [USER, {"role": "assistant", "content": "Ho", "reasoning_content": "Hm"}, USER]
    compared = 0
    for path in sorted(templates_folder.glob("*.jinja")):
        source = freeze_date(path.read_text(encoding="utf-8"), DATE)
        template = ChatTemplate(source, tokenizer.special_tokens_map)
        for offered in (None, tools):
            for opening in (False, True):
                try:
                    expected = tokenizer.apply_chat_template(
                        messages, offered, chat_template=source, add_generation_prompt=opening, tokenize=False
                    )
                except Exception:
                    with pytest.raises(TemplateError):
                        template.render(messages, offered, opening)
                    continue
                assert template.render(messages, offered, opening) == expected
                compared += 1
    assert compared > 200


@pytest.mark.parametrize("nothing", ["", "  \n", None])
def test_no_template_is_refused(nothing: str | None) -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplate(nothing, {})


def test_errors_speak_with_the_templates_words() -> None:
    with pytest.raises(TemplateError, match=r"not valid Jinja: .*line 2"):
        ChatTemplate("a\n{% if %}", {})
    refusing = ChatTemplate("{{ raise_exception('Only\nusers!') }}", {})
    with pytest.raises(TemplateError, match=r"refuses these messages: Only users!$"):
        refusing.render([USER])
    with pytest.raises(TemplateError, match="'gone' is undefined"):
        ChatTemplate("{{ gone.name }}", {}).render([USER])
    with pytest.raises(TemplateError, match="TypeError"):
        ChatTemplate("{{ messages[0].content + 1 }}", {}).render([USER])
    with pytest.raises(TemplateError, match="unsafe"):
        ChatTemplate("{{ messages.append(1) }}", {}).render([USER])


def test_environment_has_what_templates_use() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ bos_token }}{{ pad_token }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>", "pad_token": None})
    assert template.render([{"role": "user", "content": "<ü>"}, USER]) == '{"role": "user", "content": "<ü>"}<s>'


def test_marks_avoid_what_the_chat_holds() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}", {})
    chat = Chat((Message("user", "\U00100000\U00100001"), Message("assistant", "b")))
    skeleton = Rendering(chat, template).skeleton()
    assert skeleton.pieces == ["[", "][", "]"]
    assert skeleton.fit("[\U00100000\U00100001][b]") == [(1, 3), (5, 6)]
    assert skeleton.fit("[\U00100000\U00100001][c]") is None


def test_arguments_are_given_as_the_template_wants_them() -> None:
    def chat(arguments: object) -> Chat:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return Chat((Message("user", "Hi"), Message("assistant", "", tool_calls=(call,))))

    as_object = ChatTemplate("{{ messages[1].tool_calls[0].function.arguments | tojson }}", {})
    as_text = ChatTemplate("{{ '' + messages[1].tool_calls[0].function.arguments }}", {})
    assert Rendering(chat('{"a": 1}'), as_object).text == '{"a": 1}'
    assert Rendering(chat({"a": 1}), as_object).text == '{"a": 1}'
    assert Rendering(chat('{"a":1}'), as_text).text == '{"a":1}'
    assert Rendering(chat("no json"), as_object).text == '"no json"'
