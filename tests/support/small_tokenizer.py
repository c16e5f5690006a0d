"""A GGUF with a tokenizer of 256 bytes and some special tokens, for llama.cpp's server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.reasoning_content %}"
    "{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
"""ChatML with thoughts, and the switch that many families have."""
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
_TYPE_NORMAL, _TYPE_CONTROL = 1, 3
_WIDTH = 32


def small_gguf(
    path: Path,
    template: str = CHATML,
    special: Sequence[str] = SPECIAL,
    *,
    adds_bos: bool = False,
    architecture: str = "llama",
    weights: bool = False,
) -> bytes:
    """Write a GGUF, with tiny weights or none; return its bytes. The first special token is BOS, the second EOS."""
    import gguf

    from kolotune.chats.tokens.token_bytes import byte_letters

    characters = list(byte_letters())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*characters, *special])
    writer.add_token_types([_TYPE_NORMAL] * len(characters) + [_TYPE_CONTROL] * len(special))
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_bos_token_id(len(characters))
    writer.add_eos_token_id(len(characters) + 1)
    writer.add_add_bos_token(adds_bos)
    writer.add_chat_template(template)
    if weights:
        _add_weights(writer, len(characters) + len(special))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if weights:
        writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _add_weights(writer: Any, vocabulary: int) -> None:
    """Add a random Llama of one layer, 32 values wide."""
    import numpy as np

    writer.add_context_length(4096)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(1)
    draw = np.random.default_rng(0).normal
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", draw(0, 0.2, (_WIDTH, _WIDTH)).astype(np.float16))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", draw(0, 0.2, (vocabulary, _WIDTH)).astype(np.float16))
