"""The GGUF of a byte-level tokenizer of tests, as the converter would write its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NORMAL, _CONTROL, _ADDED = 1, 3, 4  # llama.cpp's types of tokens


def gguf_of(tokenizer: PreTrainedTokenizerFast, path: Path, template: str, *, adds_bos: bool) -> bytes:
    """Write a GGUF without weights for a tokenizer of `masking.byte_level`; return its bytes."""
    import gguf

    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    types = {index: _CONTROL if token.special else _ADDED for index, token in added.items()}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([pieces[index] for index in range(len(pieces))])
    writer.add_token_types([types.get(index, _NORMAL) for index in range(len(pieces))])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    for name, index in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if isinstance(index, int):
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(adds_bos)
    writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path.read_bytes()
