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
    check_served,
    decode,
    encode,
    labelled_texts,
    locate,
    template_of,
    trained,
)

from kolotune.chats import Chat, Message
from kolotune.chats.templates.frozen_date import freeze_date
from kolotune.chats.templates.loss_mask import ApartReason
from kolotune.chats.templates.rendering import with_separate_thoughts
from kolotune.chats.templates.reply_format import end_token
from kolotune.chats.templates.template import ChatTemplate
from kolotune.foundation.errors import TemplateError


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_real_templates(name: str, templates_folder: Path) -> None:
    family = FAMILIES[name]
    template, tokenizer = template_of(family, templates_folder), byte_level(family.special)
    for sample in CHATS + (SYSTEM_CHATS if family.system else []):
        dicts = sample.message_dicts()
        numbers = [number for number, message in enumerate(sample.messages) if message.role == ANSWER]
        matches = [
            list(re.compile(family.answer, re.DOTALL).finditer(template.render(dicts[: number + 1])))[-1]
            for number in numbers
        ]
        located = locate(sample, template, family.special)
        text = template.render(dicts)
        assert located.text == text
        assert [answer for _, answer in trained(located)] == [match[1] for match in matches]
        is_first_followed = numbers[0] + 1 < len(dicts)
        assert located.reason is (ApartReason.HISTORY if name == "qwen3" and is_first_followed else None)
        learned = check_served(sample, template, tokenizer)
        assert learned == [match[1].removeprefix("<think>\n\n</think>\n\n") for match in matches]
        encoded = encode(sample, template, tokenizer, learns_empty_thoughts=True)
        assert labelled_texts(encoded, tokenizer) == [match[1] for match in matches]
        if not located.apart:
            assert list(located.spans) == [match.span(1) for match in matches]
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
    # Independent: the same chat with brackets that make no tokens has its answers at the same offsets.
    plain = encode(chat(*harmless), template, tokenizer)
    text, plain_text = decode(tokenizer, encoded.ids), decode(tokenizer, plain.ids)
    assert len(plain_text) == len(text)
    assert [len(answer) for answer in labelled_texts(encoded, tokenizer)] == [
        len(answer) for answer in labelled_texts(plain, tokenizer)
    ]
    for (_, answer), learned in zip(hard, labelled_texts(encoded, tokenizer), strict=True):
        assert learned.strip().startswith(answer.strip())
    ids = set(tokenizer.convert_tokens_to_ids(list(family.special)))
    assert sum(index in ids for index in encoded.ids) == sum(index in ids for index in plain.ids)


# ruff: noqa: RUF001 (DeepSeek's tokens are spelled with full-width bars)
REFUSED = {
    "llama-cpp-rwkv-world": "ends an answer with no special token",
    "GLM-4.6": "ends an answer with no special token",
    "Apertus-8B-Instruct": "ends an answer with no special token",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "opens replies differently than it writes finished",
    "Kimi-K3": "more of a turn behind its answer",
}
_ANY_SPECIAL = re.compile(r"<[|｜][^<>{}\n]{1,40}?[|｜]>|</?s>|<\|?turn\|?>|<\|?channel\|?>|\]~!?b\[?|\[e~\[")


def _published(file: str, folder: Path, switch: str = "") -> tuple[ChatTemplate, tuple[str, ...]]:
    """Return a published template with its special tokens; `switch` is a variable to turn on."""
    source = freeze_date((folder / f"{file}.jinja").read_text(encoding="utf-8"), DATE)
    template = ChatTemplate(
        f"{{%- set {switch} = true -%}}{source}" if switch else source, {"bos_token": "<s>", "eos_token": "</s>"}
    )
    text = template.render(chat(("Hi", "Hello")).message_dicts())
    return template, tuple(sorted({match[0] for match in _ANY_SPECIAL.finditer(source + text)}))


@pytest.mark.parametrize("file", REFUSED)
def test_templates_that_can_not_be_trained_are_refused(file: str, templates_folder: Path) -> None:
    template, special = _published(file, templates_folder)
    with pytest.raises(TemplateError, match=REFUSED[file]) as caught:
        locate(chat(("Hi", "Hello")), template, special)
    assert "\n" not in caught.value.cause and caught.value.hint


# What the model writes behind the opened thought: its end, if the chat has no thought.
OPENING = {
    ("Qwen-QwQ-32B", ""): "",
    ("Qwen-QwQ-32B", "enable_thinking"): "\n</think>\n\n",
    ("Qwen3.5-4B", ""): "\n</think>\n\n",
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", ""): "",
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "enable_thinking"): "\n</think>\n\n",
    ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", ""): "\n</think>\n\n",
    ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", ""): "\n</think>\n",
    ("deepseek-ai-DeepSeek-V3.1", ""): "",
    ("deepseek-ai-DeepSeek-V3.1", "thinking"): "</think>",
    ("deepseek-ai-DeepSeek-V3.2", ""): "",
    ("deepseek-ai-DeepSeek-V3.2", "thinking"): "</think>",
    ("deepseek-ai-DeepSeek-V4", ""): "",
    ("deepseek-ai-DeepSeek-V4", "thinking"): "</think>",
    ("google-gemma-4-31B-it", ""): "",
    ("google-gemma-4-31B-it", "enable_thinking"): None,  # the prompt opens no thought
    ("MiniMax-M2", ""): "\n</think>\n\n",
    ("StepFun3.5-Flash", ""): "\n</think>\n",
    ("Spark2.5", ""): "</think>",
}


@pytest.mark.parametrize(("file", "switch"), OPENING)
def test_templates_that_open_a_thought(file: str, switch: str, templates_folder: Path) -> None:
    template, special = _published(file, templates_folder, switch)
    tokenizer, closing = byte_level(special), OPENING[file, switch]
    pairs = [("Hi", "Hello"), ("Why?", "So {x}."), ("And  ", "a\n\nb")]
    sample = chat(*pairs)
    answers = [answer for _, answer in trained(locate(sample, template, special))]
    assert [answer.startswith((closing or "") + pair[1]) for answer, pair in zip(answers, pairs, strict=True)] == [
        True
    ] * 3
    learned = check_served(sample, template, tokenizer)
    assert [text.startswith(pair[1]) for text, pair in zip(learned, pairs, strict=True)] == [True] * 3
    assert all(text.endswith(special) for text in learned)
    encoded = encode(sample, template, tokenizer, learns_empty_thoughts=True)
    assert labelled_texts(encoded, tokenizer) == answers
    end = next(token for token in special if learned[0].endswith(token))
    special_text = encode(chat((end, f"Hello {end} you"), ("a", "b")), template, tokenizer)
    assert special_text.special_in_content
    assert labelled_texts(special_text, tokenizer)[1].startswith("b")


@pytest.mark.parametrize(("file", "switch"), OPENING)
@pytest.mark.parametrize("inline", [False, True])
def test_thoughts_are_trained_on_or_refused(file: str, switch: str, inline: bool, templates_folder: Path) -> None:
    template, special = _published(file, templates_folder, switch)
    closing = OPENING[file, switch]
    pairs = [("Hi", "They greet.", "Hello"), ("Why?", "Hm.", "So.")]
    turns = [
        (
            Message(USER, question),
            Message(ANSWER, f"<think>\n{thought}\n</think>\n\n{answer}")
            if inline
            else Message(ANSWER, answer, reasoning=thought),
        )
        for question, thought, answer in pairs
    ]
    sample = Chat(tuple(message for pair in turns for message in pair))
    if closing == "":
        with pytest.raises(TemplateError, match="its prompts close the thought that they open") as caught:
            locate(sample, template, special)
        assert "--template-switch" in caught.value.hint
        return
    # DeepSeek V3.2 and V4 know thoughts beside the content only.
    served = with_separate_thoughts(sample) if file[-4:] in ("V3.2", "k-V4") else sample
    learned = check_served(sample, template, byte_level(special), served)
    for text, (_, thought, answer) in zip(learned, pairs, strict=True):
        before, between, behind = text.rpartition(answer)
        assert thought in before and between and behind in special
        if closing is not None:
            assert before.removeprefix(thought).strip() == closing.strip()


QWEN3_CASES = [
    ((Message(ANSWER, "Yes", reasoning="Hm {x}"),), ["<think>\nHm {x}\n</think>\n\nYes<|im_end|>"]),
    ((Message(ANSWER, "<think>\nHm\n</think>\n\nYes"),), ["<think>\nHm\n</think>\n\nYes<|im_end|>"]),
    ((Message(ANSWER, "<think>\n\n</think>\n\nYes"),), ["<think>\n\n</think>\n\nYes<|im_end|>"]),
    (
        (Message(ANSWER, "Yes", reasoning="Hm"), Message(USER, "So?"), Message(ANSWER, "No", reasoning="Ah")),
        ["<think>\nHm\n</think>\n\nYes<|im_end|>", "<think>\nAh\n</think>\n\nNo<|im_end|>"],
    ),
    (
        (Message(ANSWER, "<think>Hm</think>Yes"), Message(USER, "So?"), Message(ANSWER, "No")),
        ["<think>\nHm\n</think>\n\nYes<|im_end|>", "No<|im_end|>"],
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
    assert tokenizer.convert_tokens_to_ids("<think>") in encoded.ids
    assert encoded.masked_thoughts == (answers[-1] == "No<|im_end|>")
    assert encoded.dropped_thoughts == len(answers) - 1


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
    "qwen3": [_QWEN_CALL, "7 degrees.<|im_end|>", "Welcome<|im_end|>"],
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
    ((_, call),) = trained(locate(last_call, template, family.special))
    assert call.endswith(TOOL_ANSWERS[name][0])
    assert check_served(TOOL_CHAT, template, tokenizer) == TOOL_ANSWERS[name]


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
    assert located.reason is ApartReason.HISTORY
    assert [answer for _, answer in trained(located)] == [
        "<|channel|>final<|message|>Hello<|return|>",
        "<|channel|>final<|message|>So.<|return|>",
    ]
