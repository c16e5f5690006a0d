"""The loss mask, proven against regular expressions written by hand for each family of templates."""

from __future__ import annotations

import datetime
import importlib
import os
import re
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from kolotune.chats import Chat, Message
from kolotune.chats.masking import EncodedChat, encode, end_token, locate
from kolotune.chats.template import ChatTemplate, freeze_date
from kolotune.errors import DataError, TemplateError

DATE = datetime.date(2026, 3, 5)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML_ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


@dataclass(frozen=True)
class Family:
    """A real template, and an expression whose first group is an answer with its end token."""

    file: str
    answer: str
    special: tuple[str, ...]
    bos: str = ""
    eos: str = ""
    system: bool = True


# ruff: noqa: RUF001 (DeepSeek's tokens are spelled with full-width bars)
_LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")
_LLAMA_ANSWER = r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)"
_CHATML_ANSWER = CHATML_ANSWER.pattern
FAMILIES = {
    "qwen2.5": Family("Qwen-Qwen2.5-7B-Instruct", _CHATML_ANSWER, CHATML_SPECIAL),
    "qwen3": Family("Qwen-Qwen3-0.6B", _CHATML_ANSWER, CHATML_SPECIAL),
    "llama3.1": Family("meta-llama-Llama-3.1-8B-Instruct", _LLAMA_ANSWER, _LLAMA, bos="<|begin_of_text|>"),
    "llama3.2": Family("meta-llama-Llama-3.2-3B-Instruct", _LLAMA_ANSWER, _LLAMA, bos="<|begin_of_text|>"),
    "llama3.3": Family("meta-llama-Llama-3.3-70B-Instruct", _LLAMA_ANSWER, _LLAMA, bos="<|begin_of_text|>"),
    "gemma2": Family(
        "google-gemma-2-2b-it",
        r"<start_of_turn>model\n(.*?<end_of_turn>)",
        ("<start_of_turn>", "<end_of_turn>", "<bos>"),
        bos="<bos>",
        system=False,
    ),
    "phi3.5": Family(
        "microsoft-Phi-3.5-mini-instruct",
        r"<\|assistant\|>\n(.*?<\|end\|>)",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        eos="<|endoftext|>",
    ),
    "nemo": Family(
        "mistralai-Mistral-Nemo-Instruct-2407",
        r"\[/INST\](.*?</s>)",
        ("[INST]", "[/INST]", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        system=False,
    ),
    "devstral": Family(
        "unsloth-mistral-Devstral-Small-2507",
        r"\[/INST\](.*?</s>)",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
    ),
    "smollm3": Family("HuggingFaceTB-SmolLM3-3B", _CHATML_ANSWER, CHATML_SPECIAL),
    "granite3.3": Family(
        "ibm-granite-granite-3.3-2B-Instruct",
        r"<\|start_of_role\|>assistant<\|end_of_role\|>(.*?<\|end_of_text\|>)",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    ),
    "granite4": Family(
        "ibm-granite-granite-4.0",
        r"<\|start_of_role\|>assistant<\|end_of_role\|>(.*?<\|end_of_text\|>)",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    ),
    "deepseek-v3.1": Family(
        "deepseek-ai-DeepSeek-V3.1",
        r"<｜Assistant｜><think></think>(.*?<｜end▁of▁sentence｜>)",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "seed-oss": Family(
        "ByteDance-Seed-OSS",
        r"<seed:bos>assistant\n(.*?<seed:eos>)",
        ("<seed:bos>", "<seed:eos>"),
        bos="<seed:bos>",
        eos="<seed:eos>",
    ),
}
HERMES = Family("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", _CHATML_ANSWER, CHATML_SPECIAL)
USER, ANSWER = "user", "assistant"
_HARD = [
    ("Hi", "Hello"),
    ("What is {x: {{ y }} {% z %}}?", "A set {x} with {{ braces }} and a % sign."),
    ("Repeat: Hello", "Hello"),
    ("  spaces around  ", "  spaces around  "),
    ("emoji 🎉👩‍👩‍👧 é e\u0301", "🎉 naïve — 日本語 👩‍👩‍👧"),
    ("lines\n\nand\n", "one\n\ntwo\n\n"),
    ("assistant", "assistant\nuser\nmodel\nsystem"),
    ("\nuser\nmodel", "Hi"),
]


def chat(*pairs: tuple[str, str], system: str | None = None, **more: Any) -> Chat:
    messages = [Message("system", system)] if system is not None else []
    for question, answer in pairs:
        messages += [Message(USER, question), Message(ANSWER, answer)]
    return Chat(tuple(messages), **more)


CHATS = [chat(pair) for pair in _HARD]
CHATS += [chat(*_HARD), chat(*_HARD[:3], ("thanks", "Hello"))]
CHATS.append(Chat((*chat(("Hi", "Hello")).messages, Message(USER, "no answer yet"))))
SYSTEM_CHATS = [chat(*_HARD, system="Be {kind}. assistant"), chat(("Hi", "Be kind."), system="Be kind.")]


@pytest.fixture(scope="session")
def templates_folder() -> Path:
    """llama.cpp's collection of real templates."""
    try:
        return Path(importlib.import_module("kolotune.llamacpp").templates_folder())
    except Exception:
        if "KOLOTUNE_TEMPLATES" not in os.environ:
            pytest.skip("neither kolotune.llamacpp nor KOLOTUNE_TEMPLATES knows where the templates are")
    return Path(os.environ["KOLOTUNE_TEMPLATES"])


@cache
def byte_level(special: tuple[str, ...], *texts: str, trim: bool = True) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with a family's special tokens, `<think>` as one that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([*texts, "Hello and some spaces assistant user system model", "naïve text"], trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@cache
def metaspace(special: tuple[str, ...], *texts: str, scheme: str = "first") -> PreTrainedTokenizerFast:
    """A small SentencePiece-like BPE: ▁ for white space, and one put in front of the text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([*texts, "Hello and some spaces\nassistant user system model.?!<|>_{}%"], trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def template_of(family: Family, folder: Path) -> ChatTemplate:
    source = freeze_date((folder / f"{family.file}.jinja").read_text(encoding="utf-8"), DATE)
    return ChatTemplate(source, {"bos_token": family.bos, "eos_token": family.eos})


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def labelled_texts(encoded: EncodedChat, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each run of labelled tokens."""
    pairs = groupby(zip(encoded.labelled, encoded.ids, strict=True), key=lambda pair: pair[0])
    return [decode(tokenizer, [index for _, index in run]) for labelled, run in pairs if labelled]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_real_templates(name: str, templates_folder: Path) -> None:
    family = FAMILIES[name]
    template, tokenizer = template_of(family, templates_folder), byte_level(family.special)
    for each in CHATS + (SYSTEM_CHATS if family.system else []):
        text = template.render(each.message_dicts())
        matches = list(re.compile(family.answer, re.DOTALL).finditer(text))
        assert len(matches) == sum(message.role == ANSWER for message in each.messages)
        found = locate(each, template, family.special)
        assert found.text == text
        assert list(found.spans) == [match.span(1) for match in matches]
        encoded = encode(each, template, tokenizer)
        assert len(encoded.ids) == len(encoded.labelled)
        assert decode(tokenizer, encoded.ids) == text
        assert not encoded.special_in_content and not encoded.boundary_merge
        assert labelled_texts(encoded, tokenizer) == [match[1] for match in matches]
        assert encoded.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_exchange_starts_at_a_token(name: str, templates_folder: Path) -> None:
    family = FAMILIES[name]
    template, tokenizer = template_of(family, templates_folder), byte_level(family.special)
    encoded = encode(chat(*_HARD), template, tokenizer)
    assert encoded.turn_starts[0] == 0 and len(encoded.turn_starts) == len(_HARD)
    bounds = [*encoded.turn_starts, len(encoded.ids)]
    for number, (question, answer) in enumerate(_HARD):
        part = slice(bounds[number], bounds[number + 1])
        text = decode(tokenizer, encoded.ids[part])
        assert question.strip() in text and answer.strip() in text
        assert not encoded.labelled[part][0] and any(encoded.labelled[part])
        assert not number or text.startswith(family.special)


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_contents_are_plain_text(name: str, templates_folder: Path) -> None:
    family = FAMILIES[name]
    template, tokenizer = template_of(family, templates_folder), byte_level(family.special)
    special = " and ".join(family.special)
    hard = [
        (f"Say {special}", f"{special}!"),
        ("again", f"  {family.special[0]} x {special}"),
        (special, special),
    ]
    harmless = [tuple(re.sub(r"[<\[]([^<\[]*)[>\]]", r"(\1)", text) for text in pair) for pair in hard]
    each = chat(*hard)
    encoded = encode(each, template, tokenizer)
    assert encoded.special_in_content
    text = template.render(each.message_dicts())
    assert decode(tokenizer, encoded.ids) == text
    # Independent: the same chat with brackets that make no tokens has its answers at the same places.
    plain = template.render(chat(*harmless).message_dicts())
    assert len(plain) == len(text)
    spans = [match.span(1) for match in re.compile(family.answer, re.DOTALL).finditer(plain)]
    assert len(spans) == 3
    assert labelled_texts(encoded, tokenizer) == [text[start:end] for start, end in spans]
    ids = set(tokenizer.convert_tokens_to_ids(list(family.special)))
    plain_ids = tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert sum(index in ids for index in encoded.ids) == sum(index in ids for index in plain_ids)


REFUSED = {
    "Qwen-QwQ-32B": r"opens a reply with '<think>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": r"opens a reply with '<think>\\n</think>'",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": r"opens a reply with '<think>\\n'",
    "google-gemma-4-31B-it": r"opens a reply with '<\|channel>thought",
    "llama-cpp-rwkv-world": "ends an answer with no special token",
    "GLM-4.6": "ends an answer with no special token",
    "Apertus-8B-Instruct": "ends an answer with no special token",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "opens replies otherwise than it writes finished",
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
    each = Chat((Message(USER, "Hi"), Message(ANSWER, "Hello", reasoning="They greet.")))
    found = locate(each, template, special)
    assert [found.text[a:b] for a, b in found.spans] == ["They greet.\n</think>\n\nHello[e~["]


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
    each = Chat((Message(USER, "Is it?"), *turns))
    if answers is None:
        with pytest.raises(TemplateError, match="changes the text"):
            encode(each, template, tokenizer)
        return
    encoded = encode(each, template, tokenizer)
    assert labelled_texts(encoded, tokenizer) == answers
    if "<think>" in answers[-1]:
        assert tokenizer.convert_tokens_to_ids("<think>") in encoded.ids


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {}},
    },
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
}
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
    assert len(encoded.turn_starts) == 2
    assert "Thanks" not in decode(tokenizer, encoded.ids[: encoded.turn_starts[1]])
    last_call = Chat(TOOL_CHAT.messages[:2], tools=TOOL_CHAT.tools)
    found = locate(last_call, template, family.special)
    assert found.text[slice(*found.spans[0])].endswith(TOOL_ANSWERS[name][0])


@pytest.mark.parametrize(
    ("name", "each", "reason"),
    [
        ("phi3.5", Chat(chat(("Hi", "Ho")).messages, tools=(TOOL,)), "no place for tools"),
        ("granite3.3", TOOL_CHAT, "no place for tool calls"),
        (
            "phi3.5",
            Chat((*chat(("Hi", "Ho")).messages, Message("tool", "7"), Message(ANSWER, "x"))),
            "results of tools",
        ),
        (
            "llama3.1",
            Chat((Message(USER, "a"), Message(ANSWER, "b", tool_calls=(CALL,)))),
            "text beside a tool call",
        ),
        (
            "llama3.1",
            Chat((Message(USER, "a"), Message(ANSWER, "b", reasoning="c"))),
            "no place for reasoning",
        ),
        ("nemo", chat(("Hi", "Ho"), system="Be kind."), "leaves out system messages"),
        ("gemma2", chat(("Hi", "Ho"), system="Be kind."), "System role not supported"),
        ("gemma2", Chat((Message(USER, "a"), Message(USER, "b"), Message(ANSWER, "c"))), "must alternate"),
        (
            "deepseek-v3.1",
            Chat((Message(USER, "a"), Message(ANSWER, "<think>b</think>c"))),
            "no place for reasoning",
        ),
        ("qwen2.5", Chat((Message(USER, "a"), Message(ANSWER, "  "))), "no text that could be trained on"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused(
    name: str, each: Chat, reason: str, templates_folder: Path
) -> None:
    family = FAMILIES[name]
    with pytest.raises(TemplateError, match=reason):
        locate(each, template_of(family, templates_folder), family.special)


def test_gpt_oss_learns_to_stop_with_one_token(templates_folder: Path) -> None:
    source = freeze_date((templates_folder / "openai-gpt-oss-120b.jinja").read_text(encoding="utf-8"), DATE)
    special = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
    template = ChatTemplate(source, {})
    assert end_token(template, special) == "<|return|>"
    found = locate(chat(("Hi", "Hello"), ("Why?", "So.")), template, special)
    assert [found.text[a:b] for a, b in found.spans] == [
        "<|channel|>final<|message|>Hello",
        "<|channel|>final<|message|>So.<|return|>",
    ]


def test_template_written_in_other_ways() -> None:
    special = ("<s>", "</s>", "<|im_end|>")

    def spans(source: str, each: Chat) -> list[str]:
        found = locate(each, ChatTemplate(source, {"eos_token": "</s>"}), special)
        return [found.text[a:b] for a, b in found.spans]

    # Llama 2's way, with the system text in the last question: earlier prompts differ from the chat's text.
    late = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {% if messages[0].role == 'system' and "
        "m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}{{ messages[0].content }} "
        "{% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }} </s>{% endif %}"
        "{% endfor %}"
    )
    assert spans(late, chat(("a", "b"), ("c", "d"), system="S")) == [" b </s>", " d </s>"]
    # ChatML in which the number of turns stands in front: no prompt is a beginning of the chat's text.
    counted = "{{ messages | length }}" + CHATML
    assert spans(counted, chat(("a", "b"), ("c", "d"))) == ["b<|im_end|>", "d<|im_end|>"]
    assert spans(counted, chat(("a <|im_start|>assistant\n", "b"))) == ["b<|im_end|>"]
    assert spans(counted, chat(("a", "b"), (" ", "d"))) == ["b<|im_end|>", "d<|im_end|>"]
    with pytest.raises(TemplateError, match="where an answer starts in this template can't be told"):
        spans(counted, chat(("a", "<|im_start|>assistant\n"), (" ", "d")))
    # A chat may begin with the assistant.
    first = Chat((Message(ANSWER, "Welcome"), *chat(("a", "b")).messages))
    assert spans(CHATML, first) == ["Welcome<|im_end|>", "b<|im_end|>"]
    # The end of sequence in a row of tokens is what stops the model.
    row = CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }}<|im_end|></s>")
    assert spans(row, chat(("a", "b"))) == ["b<|im_end|></s>"]
    twice = CHATML.replace("{{ m.content }}", "{{ m.content }}|{{ m.content }}")
    with pytest.raises(TemplateError, match="once each"):
        spans(twice, chat(("a", "b")))
    polite = CHATML.replace("{{ m.content }}", "{{ m.content.replace('damn', 'd***') }}")
    assert spans(polite, chat(("damn", "b"))) == ["b<|im_end|>"]
    with pytest.raises(TemplateError, match="changes the text"):
        spans(polite, chat(("a", "damn b")))
    with pytest.raises(TemplateError, match="no special token"):
        locate(chat(("a", "b")), ChatTemplate(CHATML, {}), ("<s>",))


def test_a_message_that_is_dropped_is_seen_even_if_its_text_stands_elsewhere() -> None:
    deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(TemplateError, match="leaves out system messages"):
        locate(chat(("Hi there", "Hello"), system="Hi"), ChatTemplate(deaf, {}), CHATML_SPECIAL)


def test_offsets_may_be_trimmed_and_settings_are_put_back() -> None:
    tokenizer = byte_level(CHATML_SPECIAL)
    backend = tokenizer.backend_tokenizer
    each = chat(("a", "  b  c \n"), ("d", "\n e"))
    plain = encode(each, ChatTemplate(CHATML, {}), tokenizer)
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=99)
    backend.encode_special_tokens = True
    before = backend.truncation, backend.padding, repr(backend.post_processor)
    try:
        assert encode(each, ChatTemplate(CHATML, {}), tokenizer) == plain
        with pytest.raises(TemplateError):
            encode(each, ChatTemplate("{{ gone.x }}", {}), tokenizer)
        assert (backend.truncation, backend.padding, repr(backend.post_processor)) == before
        assert backend.encode_special_tokens
    finally:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
    untrimmed = encode(each, ChatTemplate(CHATML, {}), byte_level(CHATML_SPECIAL, trim=False))
    assert untrimmed == plain


def test_a_token_across_the_start_of_an_answer_is_not_labelled() -> None:
    tokenizer = byte_level(CHATML_SPECIAL, *["\n\n"] * 50)
    each = chat(("a", "\n\nHello"), ("b", "Hello"))
    encoded = encode(each, ChatTemplate(CHATML, {}), tokenizer)
    text = ChatTemplate(CHATML, {}).render(each.message_dicts())
    assert encoded.boundary_merge and decode(tokenizer, encoded.ids) == text
    assert encoded.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert labelled_texts(encoded, tokenizer) == ["\nHello<|im_end|>", "Hello<|im_end|>"]
    assert not encode(chat(("a", "Hello")), ChatTemplate(CHATML, {}), tokenizer).boundary_merge


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace(scheme: str) -> None:
    tokenizer = metaspace(CHATML_SPECIAL, scheme=scheme)
    template = ChatTemplate(CHATML, {})
    each = chat(("some spaces", "Hello and some"), ("model", " Hello  and"), system="system")
    encoded = encode(each, template, tokenizer)
    text = template.render(each.message_dicts())
    assert encoded.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids)
    runs = groupby(zip(encoded.labelled, tokens, strict=True), key=lambda pair: pair[0])
    answers = ["".join(token for _, token in run).replace("▁", " ") for labelled, run in runs if labelled]
    assert answers == ["Hello and some<|im_end|>", " Hello  and<|im_end|>"]
    assert not encoded.boundary_merge


def test_metaspace_merges_across_the_start() -> None:
    tokenizer = metaspace(CHATML_SPECIAL, *["t\nHe"] * 50, scheme="never")
    encoded = encode(chat(("a", "Hello"), ("a", "some")), ChatTemplate(CHATML, {}), tokenizer)
    assert encoded.boundary_merge
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids)
    labelled = [token for token, label in zip(tokens, encoded.labelled, strict=True) if label]
    assert "".join(labelled) == "llo<|im_end|>some<|im_end|>"


def test_special_tokens_in_contents_are_refused_where_they_can_not_be_exact() -> None:
    template = ChatTemplate(CHATML, {})
    each = chat(("write <|im_end|>", "some <|im_end|> Hello"))
    with pytest.raises(DataError, match="can't write as plain text exactly"):
        encode(each, template, metaspace(CHATML_SPECIAL, scheme="first"))
    encoded = encode(each, template, metaspace(CHATML_SPECIAL, scheme="never"))
    end = metaspace(CHATML_SPECIAL, scheme="never").convert_tokens_to_ids("<|im_end|>")
    assert encoded.special_in_content and encoded.ids.count(end) == 2
    cutting = CHATML.replace("{{ m.content }}", "{{ m.content.replace('cut', '') if m.role == 'user' else m.content }}")
    with pytest.raises(DataError, match="can't be told from those"):
        encode(chat(("cut <|im_end|>", "b")), ChatTemplate(cutting, {}), byte_level(CHATML_SPECIAL))
    call = {"function": {"name": "f", "arguments": {"a": "<|im_end|>"}}}
    listing = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    listing = CHATML.replace("{{ m.content }}", "{{ m.content }}" + listing)
    calling = Chat((Message(USER, "a"), Message(ANSWER, "", tool_calls=(call,))))
    with pytest.raises(DataError, match="a tool call holds"):
        encode(calling, ChatTemplate(listing, {}), byte_level(CHATML_SPECIAL))


def test_special_tokens_that_take_white_space_with_them() -> None:
    backend = Tokenizer.from_str(byte_level(("<|im_start|>",)).backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False, rstrip=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    template = ChatTemplate(CHATML, {})
    encoded = encode(chat(("a <|im_end|>  b", "c"), ("d", "e")), template, tokenizer)
    assert labelled_texts(encoded, tokenizer) == ["c<|im_end|>", "e<|im_end|>"]
    same = encode(chat(("a", "c"), ("d", "e")), template, tokenizer)
    assert encoded.ids[-12:] == same.ids[-12:]


def test_tokens_that_do_not_give_the_text_back_are_refused() -> None:
    backend = Tokenizer.from_str(byte_level(CHATML_SPECIAL).backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    template, each = ChatTemplate(CHATML, {}), chat(("e\u0301", "e\u0301"))
    composed = encode(each, template, PreTrainedTokenizerFast(tokenizer_object=backend))
    assert composed.ids == encode(chat(("é", "é")), template, byte_level(CHATML_SPECIAL)).ids
    lacking = Tokenizer(models.BPE())
    lacking.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lacking.decoder = decoders.ByteLevel()
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c != "q"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    lacking.train_from_iterator(["Hello"], trainer)
    lacking.add_special_tokens([AddedToken(text, special=True) for text in CHATML_SPECIAL])
    with pytest.raises(DataError, match="don't give the text back"):
        encode(chat(("a", "q")), template, PreTrainedTokenizerFast(tokenizer_object=lacking))
    with pytest.raises(DataError, match="half a character"):
        encode(chat(("a", "\ud83d")), template, byte_level(CHATML_SPECIAL))


_CONTENT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n{}%<|>🎉ab")), max_size=30)
_SPICED = st.lists(st.one_of(_CONTENT, st.sampled_from([*CHATML_SPECIAL, "<think>"])), max_size=4).map("".join)


def _pairs(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[tuple[str, str]]]:
    return st.lists(st.tuples(content, content.filter(lambda text: bool(text.strip()))), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(pairs=_pairs(_CONTENT), system=st.none() | _CONTENT)
def test_any_contents(pairs: list[tuple[str, str]], system: str | None) -> None:
    template, tokenizer = ChatTemplate(CHATML, {}), byte_level(CHATML_SPECIAL)
    each = chat(*pairs, system=system)
    text = template.render(each.message_dicts())
    encoded = encode(each, template, tokenizer)
    assert decode(tokenizer, encoded.ids) == text
    assert encoded.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not encoded.special_in_content
    assert labelled_texts(encoded, tokenizer) == CHATML_ANSWER.findall(text)
    # Cutting at an exchange gives the tokens of the shorter chat.
    for count, start in enumerate(encoded.turn_starts[1:], 1):
        assert encoded.ids[:start] == encode(chat(*pairs[:count], system=system), template, tokenizer).ids


@settings(max_examples=150, deadline=None)
@given(pairs=_pairs(_SPICED))
def test_any_contents_with_special_tokens(pairs: list[tuple[str, str]]) -> None:
    template, tokenizer = ChatTemplate(CHATML, {}), byte_level(CHATML_SPECIAL)
    text = template.render(chat(*pairs).message_dicts())
    encoded = encode(chat(*pairs), template, tokenizer)
    assert decode(tokenizer, encoded.ids) == text
    harmless = [tuple(re.sub(r"<\|(\w+)\|>", r"(!\1!)", part) for part in pair) for pair in pairs]
    plain = template.render(chat(*harmless).message_dicts())
    spans = [match.span(1) for match in CHATML_ANSWER.finditer(plain)]
    assert labelled_texts(encoded, tokenizer) == [text[start:end] for start, end in spans]
    assert encoded.special_in_content == any(
        token in part for pair in pairs for part in pair for token in CHATML_SPECIAL
    )
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert encoded.ids.count(start) == encoded.ids.count(end) == 2 * len(pairs)
