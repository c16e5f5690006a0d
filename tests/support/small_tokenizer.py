"""A GGUF with a tokenizer of 256 bytes and some special tokens, for llama.cpp's server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
_TYPE_NORMAL, _TYPE_CONTROL = 1, 3


def small_gguf(
    path: Path, template: str = CHATML, special: Sequence[str] = SPECIAL, *, adds_bos: bool = False
) -> bytes:
    """Write a GGUF without weights; return its bytes. The first special token is BOS, the second EOS."""
    import gguf

    from kolotune.chats.tokens.token_bytes import byte_letters

    characters = list(byte_letters())
    writer = gguf.GGUFWriter(path, "llama")
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path.read_bytes()
