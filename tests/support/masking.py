"""Chats, chat template families and small tokenizers, shared by the tests of the loss mask."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kolotune.chats import Chat, Message
from kolotune.chats.templates.loss_mask import AnswerLocator, LocatedChat
from kolotune.chats.templates.rendering import Rendering
from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.templates.template_binding import bind
from kolotune.chats.tokens.encoded_chat import EncodedChat
from kolotune.chats.tokens.encoder import Encoder

DATE = datetime.date(2026, 3, 5)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML_ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


@dataclass(frozen=True)
class Family:
    """A published template, and an expression whose first group is an answer with its end token."""

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


@cache
def byte_level(special: tuple[str, ...], *texts: str, trim: bool = True) -> PreTrainedTokenizerFast:
    """Return a small byte-level BPE with a family's special tokens, and `<think>` as an added one."""
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
    """Return a small SentencePiece-like BPE: ▁ for white space, and one in front of the text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([*texts, "Hello and some spaces\nassistant user system model.?!<|>_{}%"], trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def template_of(family: Family, folder: Path) -> ChatTemplate:
    tokens = {"bos_token": family.bos, "eos_token": family.eos}
    source = bind((folder / f"{family.file}.jinja").read_text(encoding="utf-8"), DATE, tokens)
    return ChatTemplate(source, tokens)


def locate(chat: Chat, template: ChatTemplate, special: Collection[str]) -> LocatedChat:
    return AnswerLocator(template, special).locate(chat)


def check_served(
    sample: Chat, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast, served: Chat | None = None
) -> list[str]:
    """Check that each answer is trained behind the tokens of its prompt as it is served; return the trained texts.

    The answer has its own tokens where it is a sequence of its own. Labels are on it, without an empty thought.

    Args:
        sample: The chat.
        template, tokenizer: What it is encoded with.
        served: The chat as a server gets it, if it is not the same.
    """
    encoder = encoder_of(template, tokenizer)
    encoded, dicts = encoder.encode(sample), Rendering(served or sample, template).message_dicts()
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    located = locate(sample, template, special)
    thoughts = located.empty_thoughts or tuple(answer.empty_thought for answer in located.apart)
    numbers = [number for number, message in enumerate(sample.messages) if message.role == ANSWER]
    ends = encoded.ends or (len(encoded),)
    texts, labelled = [], 0
    for at, (number, (prompt, answer), thought) in enumerate(zip(numbers, trained(located), thoughts, strict=True)):
        last = ends[at] if encoded.ends else ends[0]
        first = ends[at - 1] if encoded.ends and at else 0
        ids, labels = encoded.ids[first:last], encoded.labelled[first:last]
        if number:
            thinks = bool(sample.messages[number].reasoning)
            assert prompt == template.render(dicts[:number], sample.tools, add_generation_prompt=True, thinks=thinks)
            prompt_ids = encoder.prompt_ids(dicts[:number], sample.tools, thinks)
            assert prompt_ids == ids[: len(encode_text(tokenizer, prompt))]
        start = len(encode_text(tokenizer, prompt))
        assert ids[:start] == encode_text(tokenizer, prompt)
        stop = next((n for n in range(labels.index(True, start), len(ids)) if not labels[n]), len(ids))
        assert decode(tokenizer, ids[start:stop]) == answer
        learned = labels[start:stop]
        assert learned == sorted(learned), "what is not learned of an answer is at its start"
        text = decode(tokenizer, [token for token, label in zip(ids[start:stop], learned, strict=True) if label])
        assert text == answer[thought:]
        labelled += sum(learned)
        texts.append(text)
        if encoded.ends:
            assert stop == len(ids) and ids[start:] == encode_text(tokenizer, answer)
    assert labelled == sum(encoded.labelled), "nothing else is learned"
    return texts


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the tokens of a text, as a server encodes it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def trained(located: LocatedChat) -> list[tuple[str, str]]:
    """Return each prompt and answer of a chat, in one piece or not."""
    whole = [(located.text[:start], located.text[start:end]) for start, end in located.spans]
    return [(answer.prompt, answer.answer) for answer in located.apart] or whole


def encode(
    chat: Chat, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast, learns_empty_thoughts: bool = False
) -> EncodedChat:
    return encoder_of(template, tokenizer, learns_empty_thoughts).encode(chat)


@lru_cache(8)
def encoder_of(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerFast, learns_empty_thoughts: bool = False
) -> Encoder:
    return Encoder(template, tokenizer, learns_empty_thoughts)


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def sequences(encoded: EncodedChat) -> list[tuple[list[int], list[int]]]:
    """Return each sequence as the ids before the first label, and the ids from there on; all of those are labelled."""
    parts, start = [], 0
    for length in encoded.lengths:
        ids, labels = encoded.ids[start : start + length], encoded.labelled[start : start + length]
        first = labels.index(True)
        assert all(labels[first:])
        parts.append((ids[:first], ids[first:]))
        start += length
    return parts


def labelled_texts(encoded: EncodedChat, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the text of each run of labelled tokens."""
    pairs = groupby(zip(encoded.labelled, encoded.ids, strict=True), key=lambda pair: pair[0])
    return [decode(tokenizer, [index for _, index in run]) for labelled, run in pairs if labelled]
