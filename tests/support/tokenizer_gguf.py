"""The GGUFs of the small tokenizers of tests, as the converter would write their headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NORMAL, _CONTROL, _ADDED = 1, 3, 4  # llama.cpp's types of tokens


def gguf_of(tokenizer: PreTrainedTokenizerFast, path: Path, template: str, *, adds_bos: bool) -> bytes:
    """Write a GGUF without weights for a tokenizer of `masking.byte_level`; return its bytes."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_add_bos_token(adds_bos)
        writer.add_chat_template(template)

    return _write(tokenizer, path, add)


def sentencepiece_gguf_of(tokenizer: PreTrainedTokenizerFast, path: Path) -> bytes:
    """Write a GGUF without weights for a tokenizer of `masking.metaspace`; return its bytes."""

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(index) for index in range(len(tokenizer))])  # early merges come first
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(True)

    return _write(tokenizer, path, add)


def scored_gguf_of(file: Path, path: Path) -> bytes:
    """Write a GGUF without weights for a tokenizer.model of SentencePiece's; return its bytes."""
    import gguf
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    model.ParseFromString(file.read_bytes())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([piece.type for piece in model.pieces])  # both number the types alike
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path.read_bytes()


def _write(tokenizer: PreTrainedTokenizerFast, path: Path, add: Callable[[Any], None]) -> bytes:
    import gguf

    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    types = {index: _CONTROL if token.special else _ADDED for index, token in tokenizer.added_tokens_decoder.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([pieces[index] for index in range(len(pieces))])
    writer.add_token_types([types.get(index, _NORMAL) for index in range(len(pieces))])
    for name, index in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if isinstance(index, int):
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path.read_bytes()
