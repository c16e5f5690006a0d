"""The loss mask, proven against regular expressions written by hand for each family of templates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.masking import (
    ANSWER,
    CHATS,
    DATE,
    FAMILIES,
    HERMES,
    SYSTEM_CHATS,
    USER,
    byte_level,
    chat,
    decode,
    encode,
    labelled_texts,
    locate,
    template_of,
)

from kolotune.chats import Chat, Message
from kolotune.chats.templates.frozen_date import freeze_date
from kolotune.chats.templates.loss_mask import end_token
from kolotune.chats.templates.template import ChatTemplate
from kolotune.foundation.errors import TemplateError


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_real_templates(name: str, templates_folder: Path) -> None:
    family = FAMILIES[name]
    template, tokenizer = template_of(family, templates_folder), byte_level(family.special)
    for sample in CHATS + (SYSTEM_CHATS if family.system else []):
        text = template.render(sample.message_dicts())
        matches = list(re.compile(family.answer, re.DOTALL).finditer(text))
        assert len(matches) == sum(message.role == ANSWER for message in sample.messages)
        located = locate(sample, template, family.special)
        assert located.text == text
        assert list(located.spans) == [match.span(1) for match in matches]
        encoded = encode(sample, template, tokenizer)
        assert len(encoded.ids) == len(encoded.labelled)
        assert decode(tokenizer, encoded.ids) == text
        assert not encoded.special_in_content and not encoded.boundary_merge
        assert labelled_texts(encoded, tokenizer) == [match[1] for match in matches]
        assert encoded.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_contents_are_plain_text(name: str, templates_folder: Path) -> None:
    family = FAMILIES[name]
    template, tokenizer = template_of(family, templates_folder), byte_level(family.special)
    special = " and ".join(family.special)
    hard = [(f"Say {special}", f"{special}!"), ("again", f"  {family.special[0]} x {special}"), (special, special)]
    harmless = [tuple(re.sub(r"[<\[]([^<\[]*)[>\]]", r"(\1)", text) for text in pair) for pair in hard]
    sample = chat(*hard)
    encoded = encode(sample, template, tokenizer)
    assert encoded.special_in_content
    text = template.render(sample.message_dicts())
    assert decode(tokenizer, encoded.ids) == text
    # Independent: the same chat with brackets that make no tokens has its answers at the same offsets.
    plain = template.render(chat(*harmless).message_dicts())
    assert len(plain) == len(text)
    spans = [match.span(1) for match in re.compile(family.answer, re.DOTALL).finditer(plain)]
    assert len(spans) == 3
    assert labelled_texts(encoded, tokenizer) == [text[start:end] for start, end in spans]
    ids = set(tokenizer.convert_tokens_to_ids(list(family.special)))
    plain_ids = tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert sum(index in ids for index in encoded.ids) == sum(index in ids for index in plain_ids)


# ruff: noqa: RUF001 (DeepSeek's tokens are spelled with full-width bars)
REFUSED = {
    "Qwen-QwQ-32B": r"opens a reply with '<think>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": r"opens a reply with '<think>\\n</think>'",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": r"opens a reply with '<think>\\n'",
    "google-gemma-4-31B-it": r"opens a reply with '<\|channel>thought",
    "llama-cpp-rwkv-world": "ends an answer with no special token",
    "GLM-4.6": "ends an answer with no special token",
    "Apertus-8B-Instruct": "ends an answer with no special token",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "opens replies differently than it writes finished",
    "Kimi-K3": "more of a turn behind its answer",
}
_ANY_SPECIAL = re.compile(r"<[|｜][^<>{}\n]{1,40}?[|｜]>|</?s>|<\|?turn\|?>|<\|?channel\|?>")


@pytest.mark.parametrize("file", REFUSED)
def test_templates_that_can_not_be_trained_are_refused(file: str, templates_folder: Path) -> None:
    source = freeze_date((templates_folder / f"{file}.jinja").read_text(encoding="utf-8"), DATE)
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    text = template.render(chat(("Hi", "Hello")).message_dicts())
    special = {match[0] for match in _ANY_SPECIAL.finditer(source + text)}
    with pytest.raises(TemplateError, match=REFUSED[file]) as caught:
        locate(chat(("Hi", "Hello")), template, special)
    assert "\n" not in caught.value.cause and caught.value.hint


def test_thinking_that_the_prompt_opens_is_trained_on_where_the_chat_has_it(templates_folder: Path) -> None:
    source = (templates_folder / "MiniMax-M2.jinja").read_text(encoding="utf-8")
    template, special = ChatTemplate(source, {}), ("]~b]", "]~!b[", "[e~[")
    with pytest.raises(TemplateError, match="training and serving would differ"):
        locate(chat(("Hi", "Hello")), template, special)
    sample = Chat((Message(USER, "Hi"), Message(ANSWER, "Hello", reasoning="They greet.")))
    located = locate(sample, template, special)
    assert [located.text[a:b] for a, b in located.spans] == ["They greet.\n</think>\n\nHello[e~["]


QWEN3_CASES = [
    ((Message(ANSWER, "Yes", reasoning="Hm {x}"),), ["<think>\nHm {x}\n</think>\n\nYes<|im_end|>"]),
    ((Message(ANSWER, "<think>\nHm\n</think>\n\nYes"),), ["<think>\nHm\n</think>\n\nYes<|im_end|>"]),
    ((Message(ANSWER, "<think>\n\n</think>\n\nYes"),), ["<think>\n\n</think>\n\nYes<|im_end|>"]),
    (
        (Message(ANSWER, "Yes", reasoning="Hm"), Message(USER, "So?"), Message(ANSWER, "No", reasoning="Ah")),
        ["Yes<|im_end|>", "<think>\nAh\n</think>\n\nNo<|im_end|>"],
    ),
    (
        (Message(ANSWER, "<think>Hm</think>Yes"), Message(USER, "So?"), Message(ANSWER, "No")),
        ["Yes<|im_end|>", "<think>\n\n</think>\n\nNo<|im_end|>"],
    ),
    ((Message(ANSWER, "a </think> b </think> c"),), None),
]


@pytest.mark.parametrize(("turns", "answers"), QWEN3_CASES)
def test_thinking_in_qwen3(turns: tuple[Message, ...], answers: list[str] | None, templates_folder: Path) -> None:
    family = FAMILIES["qwen3"]
    template, tokenizer = template_of(family, templates_folder), byte_level(family.special)
    sample = Chat((Message(USER, "Is it?"), *turns))
    if answers is None:
        with pytest.raises(TemplateError, match="changes the text"):
            encode(sample, template, tokenizer)
        return
    encoded = encode(sample, template, tokenizer)
    assert labelled_texts(encoded, tokenizer) == answers
    if "<think>" in answers[-1]:
        assert tokenizer.convert_tokens_to_ids("<think>") in encoded.ids


TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
TOOL_CHAT = Chat(
    (
        Message(USER, "Weather?"),
        Message(ANSWER, "", tool_calls=(CALL,)),
        Message("tool", '{"degrees": 7}', name="get_weather", tool_call_id="abcdefghi"),
        Message(ANSWER, "7 degrees."),
        Message(USER, "Thanks"),
        Message(ANSWER, "Welcome"),
    ),
    tools=(TOOL,),
)
_QWEN_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
TOOL_ANSWERS = {
    "qwen2.5": [_QWEN_CALL, "7 degrees.<|im_end|>", "Welcome<|im_end|>"],
    "qwen3": [_QWEN_CALL, "7 degrees.<|im_end|>", "<think>\n\n</think>\n\nWelcome<|im_end|>"],
    "llama3.1": [
        '{"name": "get_weather", "parameters": {"city": "Oslo"}}<|eot_id|>',
        "7 degrees.<|eot_id|>",
        "Welcome<|eot_id|>",
    ],
    # Its template writes a tool's result in another way at the end of a prompt than in the middle of a chat.
    "hermes3": [_QWEN_CALL, "7 degrees.<|im_end|>", "Welcome<|im_end|>"],
    "nemo": [
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]</s>',
        "7 degrees.</s>",
        "Welcome</s>",
    ],
    "granite4": [
        _QWEN_CALL.replace("<|im_end|>", "<|end_of_text|>"),
        "7 degrees.<|end_of_text|>",
        "Welcome<|end_of_text|>",
    ],
}


@pytest.mark.parametrize("name", TOOL_ANSWERS)
def test_calls_of_tools_are_answers(name: str, templates_folder: Path) -> None:
    family = (FAMILIES | {"hermes3": HERMES})[name]
    template, tokenizer = template_of(family, templates_folder), byte_level(family.special)
    encoded = encode(TOOL_CHAT, template, tokenizer)
    assert labelled_texts(encoded, tokenizer) == TOOL_ANSWERS[name]
    last_call = Chat(TOOL_CHAT.messages[:2], tools=TOOL_CHAT.tools)
    located = locate(last_call, template, family.special)
    assert located.text[slice(*located.spans[0])].endswith(TOOL_ANSWERS[name][0])


@pytest.mark.parametrize(
    ("name", "sample", "reason"),
    [
        ("phi3.5", Chat(chat(("Hi", "Ho")).messages, tools=(TOOL,)), "does not write tools"),
        ("granite3.3", TOOL_CHAT, "does not write tool calls"),
        (
            "phi3.5",
            Chat((*chat(("Hi", "Ho")).messages, Message("tool", "7"), Message(ANSWER, "x"))),
            "results of tools",
        ),
        ("llama3.1", Chat((Message(USER, "a"), Message(ANSWER, "b", tool_calls=(CALL,)))), "text beside a tool call"),
        ("llama3.1", Chat((Message(USER, "a"), Message(ANSWER, "b", reasoning="c"))), "does not write reasoning"),
        ("nemo", chat(("Hi", "Ho"), system="Be kind."), "leaves out system messages"),
        ("gemma2", chat(("Hi", "Ho"), system="Be kind."), "System role not supported"),
        ("gemma2", Chat((Message(USER, "a"), Message(USER, "b"), Message(ANSWER, "c"))), "must alternate"),
        ("deepseek-v3.1", Chat((Message(USER, "a"), Message(ANSWER, "<think>b</think>c"))), "does not write reasoning"),
        ("qwen2.5", Chat((Message(USER, "a"), Message(ANSWER, "  "))), "no text that could be trained on"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused(
    name: str, sample: Chat, reason: str, templates_folder: Path
) -> None:
    family = FAMILIES[name]
    with pytest.raises(TemplateError, match=reason):
        locate(sample, template_of(family, templates_folder), family.special)


def test_gpt_oss_learns_to_stop_with_one_token(templates_folder: Path) -> None:
    source = freeze_date((templates_folder / "openai-gpt-oss-120b.jinja").read_text(encoding="utf-8"), DATE)
    special = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
    template = ChatTemplate(source, {})
    assert end_token(template, special) == "<|return|>"
    located = locate(chat(("Hi", "Hello"), ("Why?", "So.")), template, special)
    assert [located.text[a:b] for a, b in located.spans] == [
        "<|channel|>final<|message|>Hello",
        "<|channel|>final<|message|>So.<|return|>",
    ]
