"""Rendering as transformers does, and the skeleton of a rendering."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from kolotune.chats import Chat, Message
from kolotune.chats.templates.frozen_date import freeze_date
from kolotune.chats.templates.rendering import Rendering
from kolotune.chats.templates.template import ChatTemplate
from kolotune.foundation.errors import TemplateError
from kolotune.runners import limits

DATE = datetime.date(2026, 3, 5)
# Templates with tools that Jinja2 writes as HTML, or can't write at all; we write them as llama.cpp does.
LIKE_LLAMA_CPP = ("meetkai-functionary-medium-v3.1", "llama-cpp-deepseek-r1")
USER = {"role": "user", "content": "Hi"}


def test_rendering_equals_that_of_transformers(templates_folder: Path) -> None:
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
                    if offered and path.stem in LIKE_LLAMA_CPP:
                        continue
                    with pytest.raises(TemplateError):
                        template.render(messages, offered, opening)
                    continue
                is_equal = template.render(messages, offered, opening) == expected
                assert is_equal == (not offered or path.stem not in LIKE_LLAMA_CPP), path.stem
                compared += 1
    assert compared > 200


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ none }}{{ messages[0].missing }}{% if none is none %}yes{% endif %}", "yes"),
        ("{{ '<b>' | safe + '\"' }}", '<b>"'),
        ("{{ [1, 2] | map('string') | tojson }}", '["1", "2"]'),
        ("{% set a = [1] %}{% set _ = a.append(2) %}{{ a | tojson }}{{ a.pop(0) }}{{ a | tojson }}", "[1, 2]1[2]"),
        ("{{ namespace | tojson }}", None),
        ("{{ [].insert(0, 1) }}", None),
        ("{{ {}.update(a=1) }}", None),
    ],
)
def test_rendering_where_llama_cpp_differs_from_jinja2(source: str, text: str | None) -> None:
    template = ChatTemplate(source, {})
    if text is not None:
        assert template.render([USER]) == text
        return
    with pytest.raises(TemplateError):
        template.render([USER])


def test_a_template_cannot_change_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{**USER, "parts": ["a"]}]
    template = ChatTemplate("{{ messages[0].parts.append('b') }}{{ messages.pop(0).parts | tojson }}", {})
    monkeypatch.setattr(limits, "_confined", True)  # as in a worker, where it runs in the same process
    assert template.render(messages) == template.render(messages) == '["a", "b"]'
    assert messages == [{**USER, "parts": ["a"]}]


@pytest.mark.parametrize("nothing", ["", "  \n", None])
def test_no_template_is_refused(nothing: str | None) -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplate(nothing, {})


def test_errors_quote_the_template() -> None:
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
        ChatTemplate("{{ messages.insert(0, 1) }}", {}).render([USER])


def test_the_environment_has_what_templates_use() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ bos_token }}{{ pad_token }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>", "pad_token": None})
    assert template.render([{"role": "user", "content": "<ü>"}, USER]) == '{"role": "user", "content": "<ü>"}<s>'


def test_marks_avoid_characters_of_the_chat() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}", {})
    chat = Chat((Message("user", "\U00100000\U00100001"), Message("assistant", "b")))
    skeleton = Rendering(chat, template).skeleton()
    assert skeleton.pieces == ["[", "][", "]"]
    assert skeleton.fit("[\U00100000\U00100001][b]") == [(1, 3), (5, 6)]
    assert skeleton.fit("[\U00100000\U00100001][c]") is None


def test_arguments_have_the_type_that_the_template_needs() -> None:
    def chat(arguments: object) -> Chat:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return Chat((Message("user", "Hi"), Message("assistant", "", tool_calls=(call,))))

    as_object = ChatTemplate("{{ messages[1].tool_calls[0].function.arguments | tojson }}", {})
    as_text = ChatTemplate("{{ '' + messages[1].tool_calls[0].function.arguments }}", {})
    assert Rendering(chat('{"a": 1}'), as_object).text == '{"a": 1}'
    assert Rendering(chat({"a": 1}), as_object).text == '{"a": 1}'
    assert Rendering(chat('{"a":1}'), as_text).text == '{"a":1}'
    assert Rendering(chat("no json"), as_object).text == '"no json"'
