"""Answers behind the prompts that they are served with, for templates of every kind and for chats made at random."""

from __future__ import annotations

import datetime
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masking import (
    ANSWER,
    CHATML,
    CHATML_SPECIAL,
    USER,
    byte_level,
    chat,
    check_served,
    encode,
    encoder_of,
    labelled_texts,
    locate,
    sequences,
    trained,
)

from kolotune.chats import Chat, Message
from kolotune.chats.templates.loss_mask import ApartReason
from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.templates.template_binding import bind
from kolotune.chats.tokens.answers_apart import take_apart
from kolotune.chats.tokens.backend import bare
from kolotune.foundation.errors import TemplateError

SPECIAL = ("<|u|>", "<|a|>", "<|e|>", "<|r|>", "<|channel>", "<channel|>")


def _written(answer: str, opening: str = "") -> str:
    """Return a template that writes answers like this, and opens replies with more than ``<|a|>``."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>" + answer + "{% else %}<|u|>{{ m.content }}<|e|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|a|>" + opening + "{% endif %}"
    )


_BODY = "{{ m.content }}<|e|>\n"
_LAST = "{% if loop.last %}"
_THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
TEMPLATES = {
    # name: template, what it writes before the text of an answer without a thought, and of one with a thought.
    "plain": (_written(_BODY), "", None),
    "keeps thoughts": (_written(_THOUGHT + _BODY), "", "<think>\n{}\n</think>\n\n"),
    "drops earlier thoughts": (
        _written(_LAST + "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}" + _BODY),
        "<think>\n\n</think>\n\n",
        "<think>\n{}\n</think>\n\n",
    ),
    "opens a thought and writes it in the last answer": (
        _written(_LAST + "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}" + _BODY, "<think>\n"),
        "\n</think>\n\n",
        "{}\n</think>\n\n",
    ),
    "opens a thought and writes none": (_written(_BODY, "<think>\n"), "\n</think>\n\n", "{}\n</think>\n\n"),
    "opens a thought on the same line": (_written(_BODY, "<think>"), "</think>", "{}</think>"),
    "opens a thought and writes an empty one": (
        _written(
            "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n"
            "{% else %}<think></think>{% endif %}" + _BODY,
            "<think>\n",
        ),
        "\n</think>\n",
        "{}\n</think>\n",
    ),
    "opens a thought and writes its end": (
        _written(_LAST + "<think>{{ m.reasoning_content or '' }}{% endif %}</think>" + _BODY, "<think>"),
        "</think>",
        "{}</think>",
    ),
    "opens and closes a thought": (_written(_BODY, "<think>\n</think>"), "", None),
    "opens and closes a channel": (_written(_BODY, "<|channel>thought\n<channel|>"), "", None),
    "closes a thought": (_written("</think>" + _BODY, "</think>"), "", None),
    "closes a thought that it opens only in prompts": (_written("</think>" + _BODY, "<think></think>"), "", None),
    "writes thoughts with calls only": (
        _written("{% if m.tool_calls and m.reasoning_content %}<|channel>thought\n{{ m.reasoning_content }}<channel|>"
        "{% endif %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<|r|>{% endif %}" + _BODY),
        "",
        "<|channel>thought\n{}<channel|>",
    ),
    "ends the last answer differently": (_written("{{ m.content }}{{ '<|r|>' if loop.last else '<|e|>' }}"), "", None),
}  # fmt: skip
_END = {"ends the last answer differently": "<|r|>"}
# Whose chats are never in one piece, if they have several answers without thoughts.
_APART = {
    "drops earlier thoughts": ApartReason.HISTORY,
    "opens a thought and writes it in the last answer": ApartReason.HISTORY,
    "opens a thought and writes none": ApartReason.OPENING,
    "opens a thought on the same line": ApartReason.OPENING,
    "opens a thought and writes an empty one": ApartReason.OPENING,
    "opens a thought and writes its end": ApartReason.HISTORY,
    "opens and closes a thought": ApartReason.OPENING,
    "opens and closes a channel": ApartReason.OPENING,
    "closes a thought that it opens only in prompts": ApartReason.OPENING,
    "ends the last answer differently": ApartReason.HISTORY,
}
_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n{}%🎉ab")), max_size=20).filter(
    lambda text: "think>" not in text and not any(token in text for token in SPECIAL)
)
_FILLED = _TEXT.filter(lambda text: bool(text.strip()))


@cache
def _kind(name: str) -> tuple[ChatTemplate, str, str | None]:
    jinja, before, around = TEMPLATES[name]
    return ChatTemplate(jinja, {}), before, around


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=25)
@given(pairs=st.lists(st.tuples(_TEXT, _FILLED), min_size=1, max_size=3))
def test_any_answers(name: str, pairs: list[tuple[str, str]]) -> None:
    (template, before, _), end = _kind(name), _END.get(name, "<|e|>")
    sample, tokenizer = chat(*pairs), byte_level(SPECIAL)
    assert check_served(sample, template, tokenizer) == [answer + end for _, answer in pairs]
    located = locate(sample, template, SPECIAL)
    assert [answer for _, answer in trained(located)] == [before + answer + end for _, answer in pairs]
    assert located.reason is (_APART.get(name) if len(pairs) > 1 or _APART.get(name) is ApartReason.OPENING else None)
    learned = encode(sample, template, tokenizer, learns_empty_thoughts=True)
    assert labelled_texts(learned, tokenizer) == [before + answer + end for _, answer in pairs]
    masked = encode(sample, template, tokenizer)
    assert (learned.ids, learned.ends, learned.masked_thoughts) == (masked.ids, masked.ends, 0)
    assert masked.masked_thoughts == len(pairs) * bool(before)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=25)
@given(turns=st.lists(st.tuples(_TEXT, _FILLED, st.none() | _FILLED), min_size=1, max_size=3))
def test_any_answers_with_thoughts(name: str, turns: list[tuple[str, str, str | None]]) -> None:
    (template, before, around), end = _kind(name), _END.get(name, "<|e|>")
    messages = [
        message
        for question, answer, thought in turns
        for message in (Message(USER, question), Message(ANSWER, answer, reasoning=thought))
    ]
    sample, tokenizer = Chat(tuple(messages)), byte_level(SPECIAL)
    has_thoughts = any(thought is not None for _, _, thought in turns)
    if has_thoughts and around is None:
        with pytest.raises(TemplateError, match="does not write reasoning"):
            locate(sample, template, SPECIAL)
        return
    learned = check_served(sample, template, tokenizer)
    for text, (_, answer, thought) in zip(learned, turns, strict=True):
        whole = (around or "").format("\0").replace("\0", thought or "") if thought is not None else ""
        assert text.endswith(answer + end)
        # White space around a thought may be trimmed.
        assert "".join(text.removesuffix(answer + end).split()) == "".join(whole.split())
    encoded = encode(sample, template, tokenizer)
    assert encoded.masked_thoughts == sum(thought is None for _, _, thought in turns) * bool(before)
    is_kept = name == "keeps thoughts"
    assert encoded.dropped_thoughts == (0 if is_kept else sum(thought is not None for _, _, thought in turns[:-1]))


@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(_TEXT, _FILLED), min_size=1, max_size=4))
def test_as_many_tokens_are_trained_apart_as_in_one_piece(pairs: list[tuple[str, str]]) -> None:
    template, tokenizer = _kind("plain")[0], byte_level(SPECIAL)
    encoder, sample = encoder_of(template, tokenizer), chat(*pairs)
    whole = encoder.encode(sample)
    with bare(tokenizer.backend_tokenizer):
        apart = encoder._apart.encode(take_apart(sample, locate(sample, template, SPECIAL)))
    assert not whole.ends and len(apart.lengths) == len(pairs)
    assert labelled_texts(apart, tokenizer) == labelled_texts(whole, tokenizer)
    assert sum(apart.labelled) == sum(whole.labelled)


def test_a_chat_of_one_answer_is_one_sequence() -> None:
    template, tokenizer = _kind("opens a thought and writes none")[0], byte_level(SPECIAL)
    encoded = encode(chat(("a", "b")), template, tokenizer)
    assert (encoded.ends, encoded.apart) == ((), None)
    several = encode(chat(("a", "b"), ("c", "d")), template, tokenizer)
    assert several.apart is ApartReason.OPENING and several.ends == (several.lengths[0], len(several))


def test_a_switch_is_on_for_answers_with_thoughts() -> None:
    opening = "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    jinja = bind(_written(_BODY, opening), datetime.date(2026, 3, 5), {}, ["enable_thinking"])
    template, tokenizer = ChatTemplate(jinja, {}), byte_level(SPECIAL)
    sample = Chat(
        (Message(USER, "a"), Message(ANSWER, "b", reasoning="Hm"), *chat(("c", "d")).messages),
    )
    assert check_served(sample, template, tokenizer) == ["Hm\n</think>\n\nb<|e|>", "d<|e|>"]
    prompts = [prompt for prompt, _ in trained(locate(sample, template, SPECIAL))]
    assert [prompt.rpartition("<|a|>")[2] for prompt in prompts] == ["<think>\n", "<think>\n\n</think>\n\n"]
    fixed = ChatTemplate(bind(_written(_BODY, opening), datetime.date(2026, 3, 5), {}), {})
    with pytest.raises(TemplateError, match="its prompts close the thought") as caught:
        locate(sample, fixed, SPECIAL)
    assert "--template-switch" in caught.value.hint


def test_special_text_in_prompts_and_answers_is_plain_in_each_sequence() -> None:
    template, tokenizer = _kind("opens a thought and writes none")[0], byte_level(SPECIAL)
    sample = Chat(
        (Message(USER, "a <|e|>"), Message(ANSWER, "b <|e|> c", reasoning="<|u|>"), *chat(("d", "e")).messages)
    )
    encoded = encode(sample, template, tokenizer)
    end, turn = tokenizer.convert_tokens_to_ids(["<|e|>", "<|u|>"])
    assert encoded.special_in_content
    assert [
        (ids.count(end), ids.count(turn)) for ids, _ in sequences(encode(chat(("d", "e")), template, tokenizer))
    ] == [(1, 1)]
    assert labelled_texts(encoded, tokenizer) == ["<|u|>\n</think>\n\nb <|e|> c<|e|>", "e<|e|>"]
    first = encoded.ids[: encoded.lengths[0]]
    assert (first.count(end), first.count(turn)) == (2, 1)
    second = encoded.ids[encoded.lengths[0] :]
    assert (second.count(end), second.count(turn)) == (4, 2)


@pytest.mark.parametrize("opening", ["<think>Okay, ", "<reason>", "Answer: "])
def test_an_unknown_opening_is_refused(opening: str) -> None:
    with pytest.raises(TemplateError, match="training and serving would differ"):
        locate(chat(("a", "b")), ChatTemplate(_written(_BODY, opening), {}), SPECIAL)


def test_a_template_that_reads_no_thought_in_a_content_gets_it_beside_the_content() -> None:
    template, tokenizer = _kind("opens a thought and writes its end")[0], byte_level(SPECIAL)
    sample = chat(("a", "<think>\nHm\n</think>\n\nb"), ("c", "<think>\nAh\n</think>\n\nd"))
    assert [answer for _, answer in trained(locate(sample, template, SPECIAL))] == [
        "Hm</think>b<|e|>",
        "Ah</think>d<|e|>",
    ]
    assert labelled_texts(encode(sample, template, tokenizer), tokenizer) == ["Hm</think>b<|e|>", "Ah</think>d<|e|>"]


def test_a_first_answer_without_a_question() -> None:
    sample = Chat((Message(ANSWER, "Welcome"), *chat(("a", "b")).messages))
    for name, expected in (
        ("plain", "Welcome<|e|>"),
        ("opens a thought and writes none", "\n</think>\n\nWelcome<|e|>"),
    ):
        assert trained(locate(sample, _kind(name)[0], SPECIAL))[0][1] == expected
    assert trained(locate(sample, ChatTemplate(CHATML, {}), CHATML_SPECIAL))[0] == (
        "<|im_start|>assistant\n",
        "Welcome<|im_end|>",
    )


@pytest.mark.parametrize(
    ("opening", "call", "answer"),
    [
        ("<think></think>", "\n\n<call>f</call><|e|>", "It is 7.<|e|>"),
        ("<think>", "</think>\n\n<call>f</call><|e|>", "</think>It is 7.<|e|>"),
        ("</think>", "\n\n<call>f</call><|e|>", "It is 7.<|e|>"),
    ],
)
def test_calls_behind_an_opened_thought(opening: str, call: str, answer: str) -> None:
    call_or_text = (
        "{% if m.tool_calls %}{{ '\n\n' }}<call>{{ m.tool_calls[0].function.name }}</call>"
        "{% else %}{{ m.content }}{% endif %}"
    )
    tools = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    template = ChatTemplate(tools + _written(f"</think>{call_or_text}<|e|>\n", opening), {})
    function = {"type": "function", "function": {"name": "f", "arguments": {}}}
    sample = Chat(
        (
            Message(USER, "How warm?"),
            Message(ANSWER, "", tool_calls=(function,)),
            Message("tool", "7"),
            Message(ANSWER, "It is 7."),
        ),
        tools=({"type": "function", "function": {"name": "f"}},),
    )
    assert [text for _, text in trained(locate(sample, template, SPECIAL))] == [call, answer]
    check_served(sample, template, byte_level(SPECIAL))
