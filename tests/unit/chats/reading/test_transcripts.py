"""Chats, and prompts of chats, that are written as one text with marks."""

from __future__ import annotations

import pytest
from support.documented_chats import turns_shown

from kolotune.chats.reading.shapes import read_record
from kolotune.chats.reading.transcripts import turns_of_prompt

ALPACA = "Below is a task.\n\n### Instruction:\nq\n\n### Response:\n"
LLAMA_3 = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>"
PROMPTS = [
    ("\n\nHuman: q\n\nAssistant:", " a", "U q · A a"),
    ("\n\nHuman: q\n\nAssistant: b\n\nHuman: r\n\nAssistant:", " a", "U q · A b · U r · A a"),
    (ALPACA, "a</s>", "S Below is a task. · U q · A a"),
    ("[INST] q [/INST]", " a </s>", "U q · A a"),
    ("<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST] b </s><s>[INST] r [/INST]", "a", "S s · U q · A b · U r · A a"),
    ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>\n", "U q · A a"),
    (f"{LLAMA_3}assistant<|end_header_id|>\n\n", "a<|eot_id|>", "U q · A a"),
    ("<start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n", "a<end_of_turn>", "U q · A a"),
    ("<|user|>\nq<|end|>\n<|assistant|>\n", "a<|end|>", "U q · A a"),
    ("<|prompter|>q<|endoftext|><|assistant|>", "a<|endoftext|>", "U q · A a"),
    ("USER: q\nASSISTANT:", "a", "U q · A a"),
]


@pytest.mark.parametrize(("prompt", "answer", "chat"), PROMPTS)
def test_a_prompt_with_marks_is_turns(prompt: str, answer: str, chat: str) -> None:
    for question, completion in (("prompt", "completion"), ("instruction", "output")):
        assert turns_shown(read_record({question: prompt, completion: answer}).messages) == chat
    thinking = read_record({"prompt": prompt, "completion": answer, "reasoning": "t"})
    assert turns_shown(thinking.messages) == chat.removesuffix("A a") + "A(t) a"


@pytest.mark.parametrize(
    "text", ["q", "Assistant:", 'What follows "Assistant:"?', "Human: q", "Write a response:", "Human: q\nAssistant: a"]
)
def test_other_prompts_are_texts(text: str) -> None:
    assert turns_of_prompt(text) is None
    assert read_record({"prompt": text, "completion": "a</s>"}).messages[0].content == text


@pytest.mark.parametrize(
    "text",
    [
        "[INST] q [/INST] a",
        " [INST] q [/INST] a </s>",
        "<|prompter|>q<|endoftext|><|assistant|>a<|endoftext|>",
        "<|human|>q<|assistant|>a",
    ],
)
def test_chats_as_text(text: str) -> None:
    for key in ("text", "messages", "conversation"):
        assert turns_shown(read_record({key: text}).messages) == "U q · A a"


@pytest.mark.parametrize(
    ("text", "chat"),
    [
        ("s\n[INST] q [/INST] a", "S s · U q · A a"),
        ("<s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST]q[/INST]a</s>", "S s · U q · A a"),
        ("s\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>", "S s · U q · A a"),
        ("<|endoftext|><|user|>q<|end|><|assistant|>a<|end|>", "U q · A a"),
        ("<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>", "U q · A a"),
    ],
)
def test_what_is_before_the_first_mark_is_a_system_turn(text: str, chat: str) -> None:
    assert turns_shown(read_record({"text": text}).messages) == chat
