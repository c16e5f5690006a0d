"""Tiny base models with the chat templates of published families, and SmolLM2's tokenizer with their special tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune import llamacpp
from kolotune.ollama.prompt_path import PromptPath
from support.tiny import chat_line, tiny_llama


@dataclass(frozen=True)
class Family:
    """A published chat template.

    Attributes:
        file: its name in llama.cpp's collection.
        special: the special tokens that it writes; the first one ends a turn.
        bos: the token that it begins with, or "".
        path: what renders it in Ollama from 0.30 on.
    """

    file: str
    special: tuple[str, ...]
    bos: str = ""
    path: PromptPath = PromptPath.JINJA


FAMILIES = {
    "llama-3.1": Family(
        "meta-llama-Llama-3.1-8B-Instruct",
        ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"),
        "<|begin_of_text|>",
    ),
    "qwen-2.5": Family("Qwen-Qwen2.5-7B-Instruct", ("<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>")),
    "qwen-3": Family("Qwen-Qwen3-0.6B", ("<|im_end|>", "<|im_start|>", "<think>", "</think>", "<tool_call>")),
    "mistral-nemo": Family(
        "mistralai-Mistral-Nemo-Instruct-2407",
        ("</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        "<s>",
    ),
    "gemma-2": Family(
        "google-gemma-2-2b-it", ("<end_of_turn>", "<bos>", "<start_of_turn>"), "<bos>", PromptPath.TEMPLATE
    ),
    "phi-3.5": Family(
        "microsoft-Phi-3.5-mini-instruct",
        ("<|end|>", "<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
        path=PromptPath.TEMPLATE,
    ),
}

# ruff: noqa: RUF001 (DeepSeek's tokens are spelled with full-width bars)
_DEEPSEEK = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
_THINKING_CHATML = ("<|im_end|>", "<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
THINKING_FAMILIES = {
    "gemma-4": Family(
        "google-gemma-4-31B-it",
        ("<turn|>", "<bos>", "<|turn>", "<|channel>", "<channel|>", "<|think|>", "<|tool_call>", "<tool_call|>"),
        "<bos>",
    ),
    "r1-distill-llama": Family("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", _DEEPSEEK, _DEEPSEEK[1]),
    "r1-distill-qwen": Family("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", _DEEPSEEK, _DEEPSEEK[1]),
    "qwq": Family("Qwen-QwQ-32B", _THINKING_CHATML),
    "nemotron-3": Family("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", _THINKING_CHATML),
    "deepseek-v3.1": Family("deepseek-ai-DeepSeek-V3.1", _DEEPSEEK, _DEEPSEEK[1]),
    "deepseek-v3.2": Family("deepseek-ai-DeepSeek-V3.2", _DEEPSEEK, _DEEPSEEK[1]),
}


def tiny_family(folder: Path, family: Family, reporter: Any) -> Path:
    """Make a random Llama of 2 layers with a family's template and special tokens."""
    import torch

    from kolotune.base_models import packaged_model
    from kolotune.chats.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(packaged_model.unpack(reporter))
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
    tokenizer.eos_token, tokenizer.pad_token = family.special[0], family.special[0]
    tokenizer.bos_token = family.bos or family.special[0]
    tokenizer.save_pretrained(folder)
    source = llamacpp.templates_folder() / f"{family.file}.jinja"
    (folder / "chat_template.jinja").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    model = tiny_llama(
        0,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


TIDE = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": 'The tide at a <place> & an "hour".',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Größe egal", "minLength": 1},
                "hour": {"type": "integer"},
            },
            "required": ["place"],
        },
    },
}


def write_chats(path: Path, *, tools: bool) -> Path:
    """Write a few chats, the last ones with a tool call, as clients of OpenAI's API have them."""
    lines = [chat_line(number) for number in range(6)]
    lines += [_tool_chat(number) for number in range(4)] if tools else []
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_long_chats(path: Path) -> Path:
    """Write a few chats of three exchanges; no two answers are the same."""
    chats = [
        [
            {"role": role, "content": f"{text} {number}, {exchange}"}
            for exchange in range(3)
            for role, text in (("user", "Which number is"), ("assistant", "This number is"))
        ]
        for number in range(8)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path


def write_thoughtful_chats(path: Path) -> Path:
    """Write a few chats, every second one with a thought before its answer."""
    answers = [{"content": f"It is {number}.", **_thought(number)} for number in range(8)]
    chats = [
        [{"role": "user", "content": f"Which number is {number}?"}, {"role": "assistant", **answer}]
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path


def _thought(number: int) -> dict[str, str]:
    return {"reasoning_content": f"The number is {number}."} if number % 2 else {}


def _tool_chat(number: int) -> str:
    arguments = json.dumps({"hour": number, "place": "Genève"}, ensure_ascii=False)
    call = {"id": f"call{number:05}", "type": "function", "function": {"name": "get_tide", "arguments": arguments}}
    turns: Sequence[dict[str, Any]] = [
        {"role": "user", "content": f"How high is the tide at {number}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "get_tide", "tool_call_id": call["id"], "content": f'{{"metres": {number}.5}}'},
        {"role": "assistant", "content": f"It is {number}.5 metres."},
    ]
    return json.dumps({"messages": turns, "tools": [TIDE]}, ensure_ascii=False) + "\n"
