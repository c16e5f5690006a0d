"""Which template a run trains with: the base's or the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.tokens.tokenizer import TEMPLATE_FILE
from kolotune.chats.tokens.trained_template import trained_template
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError, TemplateError

TOKENS = {"bos_token": "<s>"}
BOUND = "{% set thinking = {}.undefined %}\n"


def config(folder: Path, **options: Any) -> Config:
    return configs.resolve(({"template_date": "2026-03-05", **options}, "test", folder))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / TEMPLATE_FILE).write_text("{{ bos_token }}{{ thinking }}{{ strftime_now('%Y') }}")
    return folder


def test_the_template_of_the_base_is_bound(base: Path, tmp_path: Path) -> None:
    assert trained_template(config(tmp_path), base, TOKENS) == BOUND + "{{ bos_token }}{{ thinking }}{{ '2026' }}"


def test_a_template_of_the_user_replaces_it(base: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_bytes("{{ thinking }}ü\r\n".encode())
    own = config(tmp_path, chat_template="own.jinja")
    assert own.chat_template == tmp_path / "own.jinja"
    expected = BOUND + "{{ thinking }}ü\n"
    assert trained_template(own, base, TOKENS) == expected
    (base / TEMPLATE_FILE).unlink()
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": None}))
    assert trained_template(own, base, TOKENS) == expected
    with pytest.raises(TemplateError, match="has no chat template"):
        trained_template(config(tmp_path), base, TOKENS)


def test_a_switch_stays_free(base: Path, tmp_path: Path) -> None:
    source = trained_template(config(tmp_path, template_switch="thinking"), base, TOKENS)
    template = ChatTemplate(source, TOKENS)
    assert template.switches == ("thinking",)
    for thinks, text in ((True, "<s>True2026"), (False, "<s>False2026")):
        assert template.render([], thinks=thinks) == text
        assert template.skeleton([], [], False, "\ue000", thinks)[0] == text
        signature = template.signature(["user"], False, thinks)
        assert signature is not None and signature.fill(["Hi"])[0] == text
    with pytest.raises(ConfigError, match="enable_thinking"):
        trained_template(config(tmp_path, template_switch="enable_thinking"), base, TOKENS)


@pytest.mark.parametrize("content", [None, b" \n", b"\xff\xfe"])
def test_a_file_that_is_no_template_is_refused(content: bytes | None, base: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match="own\\.jinja"):
        trained_template(config(tmp_path, chat_template="own.jinja"), base, TOKENS)


def test_a_template_that_is_not_jinja_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% if %}")
    with pytest.raises(TemplateError, match="not valid Jinja"):
        trained_template(config(tmp_path, chat_template="own.jinja"), base, TOKENS)


@pytest.mark.parametrize("others", [(), ("rag",)])
@pytest.mark.parametrize("is_listed", [True, False])
def test_a_template_for_tools_is_used_where_there_are_some(
    is_listed: bool, others: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    plain, tools = "{% if true %}\n  plain{% endif %}\n", "\n{{ tools[0].name }}!\n"
    if is_listed:
        (base / TEMPLATE_FILE).unlink()
        listed = [{"name": name, "template": f"{name} template"} for name in others]
        listed += [{"name": "tool_use", "template": tools}, {"name": "default", "template": plain}]
        (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    else:
        (base / TEMPLATE_FILE).write_text(plain)
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "tool_use.jinja").write_text(tools)
        for name in others:
            (base / "additional_chat_templates" / f"{name}.jinja").write_text(f"{name} template")
    template = ChatTemplate(trained_template(config(tmp_path), base, TOKENS), TOKENS)
    for given in (None, [{"name": "f"}]):
        source = plain if given is None else tools
        assert template.render([], given) == ChatTemplate(source, TOKENS).render([], given)
    (base / TEMPLATE_FILE).write_text(template.jinja)
