"""Tokens and labels: special tokens in contents, tokenizers of both kinds, and contents made at random."""

from __future__ import annotations

import dataclasses
import re
from array import array
from collections.abc import Callable
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masking import (
    ANSWER,
    CHATML,
    CHATML_ANSWER,
    CHATML_SPECIAL,
    USER,
    byte_level,
    chat,
    decode,
    encode,
    labelled_texts,
    locate,
    metaspace,
    sequences,
    trained,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kolotune.chats import Chat, Message
from kolotune.chats.templates.loss_mask import ApartReason
from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.tokens.backend import bare
from kolotune.chats.tokens.encoder import Encoder
from kolotune.chats.tokens.labels import Labeller
from kolotune.chats.tokens.prompt_ends import PromptEnds
from kolotune.chats.tokens.strategies import ByTokenBytes
from kolotune.chats.tokens.token_bytes import TokenBytes
from kolotune.foundation.errors import DataError, TemplateError


def test_unusual_templates() -> None:
    special = ("<s>", "</s>", "<|im_end|>")

    def answers(source: str, sample: Chat) -> list[str]:
        template, dicts = ChatTemplate(source, {"eos_token": "</s>"}), sample.message_dicts()
        found = trained(locate(sample, template, special))
        numbers = [number for number, message in enumerate(sample.messages) if message.role == ANSWER]
        for number, (prompt, _) in zip(numbers, found, strict=True):
            assert not number or prompt == template.render(dicts[:number], add_generation_prompt=True)
        return [answer for _, answer in found]

    # Llama 2's way, with the system text in the last question: earlier prompts differ from the chat's text.
    late = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {% if messages[0].role == 'system' and "
        "m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}{{ messages[0].content }} "
        "{% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }} </s>{% endif %}"
        "{% endfor %}"
    )
    assert answers(late, chat(("a", "b"), ("c", "d"), system="S")) == [" b </s>", " d </s>"]
    # ChatML in which the number of turns is in front: no prompt is a prefix of the chat's text.
    counted = "{{ messages | length }}" + CHATML
    assert answers(counted, chat(("a", "b"), ("c", "d"))) == ["b<|im_end|>", "d<|im_end|>"]
    assert answers(counted, chat(("a <|im_start|>assistant\n", "b"))) == ["b<|im_end|>"]
    assert answers(counted, chat(("a", "b"), (" ", "d"))) == ["b<|im_end|>", "d<|im_end|>"]
    assert answers(counted, chat(("a", "<|im_start|>assistant\n"), (" ", "d")))[1] == "d<|im_end|>"
    with pytest.raises(TemplateError, match="does not show where an answer starts"):
        answers(counted, Chat((Message(ANSWER, "<|im_start|>assistant\n"), *chat(("a", "b")).messages)))
    # A chat may begin with the assistant.
    first = Chat((Message(ANSWER, "Welcome"), *chat(("a", "b")).messages))
    assert answers(CHATML, first) == ["Welcome<|im_end|>", "b<|im_end|>"]
    # The end of sequence behind another special token is what stops the model.
    row = CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }}<|im_end|></s>")
    assert answers(row, chat(("a", "b"))) == ["b<|im_end|></s>"]
    twice = CHATML.replace("{{ m.content }}", "{{ m.content }}|{{ m.content }}")
    with pytest.raises(TemplateError, match="once each"):
        answers(twice, chat(("a", "b")))
    polite = CHATML.replace("{{ m.content }}", "{{ m.content.replace('damn', 'd***') }}")
    assert answers(polite, chat(("damn", "b"))) == ["b<|im_end|>"]
    with pytest.raises(TemplateError, match="changes the text"):
        answers(polite, chat(("a", "damn b")))
    with pytest.raises(TemplateError, match="no special token"):
        locate(chat(("a", "b")), ChatTemplate(CHATML, {}), ("<s>",))


def test_a_dropped_message_is_noticed_even_if_its_text_occurs_elsewhere() -> None:
    deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(TemplateError, match="leaves out system messages"):
        locate(chat(("Hi there", "Hello"), system="Hi"), ChatTemplate(deaf, {}), CHATML_SPECIAL)


def test_offsets_may_be_trimmed_and_settings_are_restored() -> None:
    tokenizer = byte_level(CHATML_SPECIAL)
    backend = tokenizer.backend_tokenizer
    sample = chat(("a", "  b  c \n"), ("d", "\n e"))
    plain = encode(sample, ChatTemplate(CHATML, {}), tokenizer)
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=99)
    backend.encode_special_tokens = True
    before = backend.truncation, backend.padding, repr(backend.post_processor)
    try:
        assert encode(sample, ChatTemplate(CHATML, {}), tokenizer) == plain
        with pytest.raises(TemplateError):
            encode(sample, ChatTemplate("{{ gone.x }}", {}), tokenizer)
        assert (backend.truncation, backend.padding, repr(backend.post_processor)) == before
        assert backend.encode_special_tokens
    finally:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
    untrimmed = encode(sample, ChatTemplate(CHATML, {}), byte_level(CHATML_SPECIAL, trim=False))
    assert untrimmed == plain


_TWO_LINES = CHATML.replace("assistant\n", "assistant\n\n").replace("{{ m.role }}\n", "{{ m.role }}\n\n")


@pytest.mark.parametrize(
    ("jinja", "sample"),
    [
        (CHATML, chat(("a", "\n\nHello"), ("b", "Hello"))),  # a token across the start of an answer
        (_TWO_LINES, chat(("a", "Hello"), ("b", "Hello"))),  # the prompt's last token is two in front of a letter
        (_TWO_LINES, chat(("a", "Hello"))),
        (_TWO_LINES, chat(("write <|im_end|>", "Hello"), ("b", "<|im_start|>Hello"))),
    ],
)
def test_where_prompt_and_answer_would_share_a_token_answers_are_apart(jinja: str, sample: Chat) -> None:
    tokenizer, template = byte_level(CHATML_SPECIAL, *["\n\n"] * 50), ChatTemplate(jinja, {})
    encoded = encode(sample, template, tokenizer)
    dicts = sample.message_dicts()
    is_special = any("<|" in message.content for message in sample.messages)
    assert encoded.special_in_content == is_special
    assert encoded.apart is (ApartReason.BOUNDARY if len(dicts) > 2 else None)
    for number, (prompt, answer) in zip(range(1, len(dicts), 2), sequences(encoded), strict=True):
        text = template.render(dicts[:number], add_generation_prompt=True)
        expected = dicts[number]["content"] + "<|im_end|>"
        assert decode(tokenizer, prompt) == text and decode(tokenizer, answer) == expected
        if not is_special:
            assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert prompt == Encoder(template, tokenizer).prompt_ids(dicts[:number])
            assert answer == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_where_they_share_none_a_chat_stays_in_one_piece() -> None:
    tokenizer, template = byte_level(CHATML_SPECIAL, *["\n\n"] * 50), ChatTemplate(CHATML, {})
    sample = chat(("a", "Hello"), ("\n\n", "x\n\n"))
    encoded = encode(sample, template, tokenizer)
    assert not encoded.ends and encoded.apart is None
    assert encoded.ids == tokenizer(template.render(sample.message_dicts()), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace(scheme: str) -> None:
    tokenizer = metaspace(CHATML_SPECIAL, scheme=scheme)
    template = ChatTemplate(CHATML, {})
    sample = chat(("some spaces", "Hello and some"), ("model", " Hello  and"), system="system")
    encoded = encode(sample, template, tokenizer)
    text = template.render(sample.message_dicts())
    assert encoded.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids)
    runs = groupby(zip(encoded.labelled, tokens, strict=True), key=lambda pair: pair[0])
    answers = ["".join(token for _, token in run).replace("▁", " ") for labelled, run in runs if labelled]
    assert answers == ["Hello and some<|im_end|>", " Hello  and<|im_end|>"]
    assert not encoded.ends


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_metaspace_merges_across_the_start(scheme: str) -> None:
    tokenizer, template = metaspace(CHATML_SPECIAL, *["t\nHe"] * 50, scheme=scheme), ChatTemplate(CHATML, {})
    sample = chat(("a", "Hello"), ("a", "some"))
    encoded = encode(sample, template, tokenizer)
    assert encoded.apart is ApartReason.BOUNDARY
    for number, (prompt, answer) in zip((1, 3), sequences(encoded), strict=True):
        text = template.render(sample.message_dicts()[:number], add_generation_prompt=True)
        assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(tokenizer.convert_ids_to_tokens(answer)) == ("Hello" if number == 1 else "some") + "<|im_end|>"


def test_special_tokens_in_contents_are_refused_where_they_can_not_be_exact() -> None:
    template = ChatTemplate(CHATML, {})
    sample = chat(("write <|im_end|>", "some <|im_end|> Hello"))
    with pytest.raises(DataError, match="can't write as plain text exactly"):
        encode(sample, template, metaspace(CHATML_SPECIAL, scheme="first"))
    encoded = encode(sample, template, metaspace(CHATML_SPECIAL, scheme="never"))
    end = metaspace(CHATML_SPECIAL, scheme="never").convert_tokens_to_ids("<|im_end|>")
    assert encoded.special_in_content and encoded.ids.count(end) == 2
    cutting = CHATML.replace("{{ m.content }}", "{{ m.content.replace('cut', '') if m.role == 'user' else m.content }}")
    with pytest.raises(DataError, match="can't be distinguished from"):
        encode(chat(("cut <|im_end|>", "b")), ChatTemplate(cutting, {}), byte_level(CHATML_SPECIAL))
    call = {"function": {"name": "f", "arguments": {"a": "<|im_end|>"}}}
    listing = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    listing = CHATML.replace("{{ m.content }}", "{{ m.content }}" + listing)
    calling = Chat((Message(USER, "a"), Message(ANSWER, "", tool_calls=(call,))))
    with pytest.raises(DataError, match="a tool call contains"):
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


def test_tokens_that_do_not_decode_to_the_text_are_refused() -> None:
    backend = Tokenizer.from_str(byte_level(CHATML_SPECIAL).backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    template, sample = ChatTemplate(CHATML, {}), chat(("e\u0301", "e\u0301"))
    composed = encode(sample, template, PreTrainedTokenizerFast(tokenizer_object=backend))
    assert composed.ids == encode(chat(("é", "é")), template, byte_level(CHATML_SPECIAL)).ids
    lacking = Tokenizer(models.BPE())
    lacking.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lacking.decoder = decoders.ByteLevel()
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c != "q"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    lacking.train_from_iterator(["Hello"], trainer)
    lacking.add_special_tokens([AddedToken(text, special=True) for text in CHATML_SPECIAL])
    with pytest.raises(DataError, match="don't decode to the text"):
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
    sample = chat(*pairs, system=system)
    text = template.render(sample.message_dicts())
    encoded = encode(sample, template, tokenizer)
    assert decode(tokenizer, encoded.ids) == text
    assert encoded.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not encoded.special_in_content
    assert labelled_texts(encoded, tokenizer) == CHATML_ANSWER.findall(text)


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


@settings(deadline=None, max_examples=60)
@given(pairs=_pairs(st.one_of(_CONTENT, st.just("\n\nHello"))))
def test_labels_by_bytes_are_those_by_offsets(pairs: list[tuple[str, str]]) -> None:
    template, tokenizer = ChatTemplate(CHATML, {}), byte_level(CHATML_SPECIAL, *["\n\n"] * 50)
    backend = tokenizer.backend_tokenizer
    token_bytes = TokenBytes(backend)
    with bare(backend):
        labeller = Labeller(PromptEnds(backend, [*CHATML_SPECIAL, "<think>", "</think>"]), learns_empty_thoughts=False)
        located = locate(chat(*pairs), template, CHATML_SPECIAL)
        (ids,) = ByTokenBytes(backend, token_bytes, labeller)._ids([located.text])
        assert ids is not None
        assert labeller.by_bytes([(located, ids)], token_bytes) == [labeller.by_offsets(located, backend)]


@pytest.mark.parametrize("template", [CHATML, "{{ messages | length }}" + CHATML])
@pytest.mark.parametrize(("text", "make"), [("a", byte_level), ("a <|im_end|> é", byte_level), ("a é", metaspace)])
def test_each_label_of_an_answer_has_its_weight(
    template: str, text: str, make: Callable[..., PreTrainedTokenizerFast]
) -> None:
    messages = [Message((USER, ANSWER)[at % 2], f"{text} {at}") for at in range(6)]
    weighted = [
        dataclasses.replace(message, weight={3: 0.0, 5: 0.25}.get(at, 1.0)) for at, message in enumerate(messages)
    ]
    encoder = Encoder(ChatTemplate(template, {"eos_token": "<|im_end|>"}), make(CHATML_SPECIAL))
    everything, some = encoder.encode(Chat(tuple(messages))), encoder.encode(Chat(tuple(weighted)))
    assert everything.packed_weights == b""
    weights = array("f", some.packed_weights).tolist()
    assert [weight > 0 for weight in weights] == some.labelled
    runs = [(weight, len(list(group))) for weight, group in groupby(weights) if weight]
    labels = [len(list(group)) for label, group in groupby(everything.labelled) if label]
    assert runs == [(1.0, labels[0]), (0.25, labels[2])]


@pytest.mark.parametrize("template", [CHATML, "{{ messages | length }}" + CHATML])
@pytest.mark.parametrize("excluded", [[1], [3], [1, 3], []])
@pytest.mark.parametrize(("text", "make"), [("a", byte_level), ("a <|im_end|> é", byte_level), ("a é", metaspace)])
def test_excluded_answers_have_no_labels_and_the_others_as_usual(
    template: str, text: str, excluded: list[int], make: Callable[..., PreTrainedTokenizerFast]
) -> None:
    messages = [Message((USER, ANSWER)[at % 2], f"{text} {at}") for at in range(6)]
    masked = [dataclasses.replace(message, weight=float(at not in excluded)) for at, message in enumerate(messages)]
    encoder = Encoder(ChatTemplate(template, {"eos_token": "<|im_end|>"}), make(CHATML_SPECIAL))
    everything, some = encoder.encode(Chat(tuple(messages))), encoder.encode(Chat(tuple(masked)))
    kept = [at for at in (1, 3, 5) if at not in excluded]
    if everything.ends:
        spans = dict(zip((1, 3, 5), pairwise((0, *everything.ends)), strict=True))
        assert some.ids == [token for at in kept for token in everything.ids[slice(*spans[at])]]
        assert some.labelled == [label for at in kept for label in everything.labelled[slice(*spans[at])]]
        return
    assert some.ids == everything.ids
    runs = [list(group) for is_on, group in groupby(enumerate(everything.labelled), lambda each: each[1]) if is_on]
    expected = {at for number, run in zip((1, 3, 5), runs, strict=True) if number in kept for at, _ in run}
    assert [at for at, label in enumerate(some.labelled) if label] == sorted(expected)
