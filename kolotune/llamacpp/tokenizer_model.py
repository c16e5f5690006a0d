"""A GGUF with the tokenizer and chat template of another one, and a tiny model without weights.

llama.cpp's server loads it in no time, and renders and tokenizes as it does with the other one.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from kolotune.foundation.errors import ArtifactError
from kolotune.weights.gguf_metadata import DAMAGED, MetadataReader, not_whole

from .prompt_server import SparseGguf

_TEMPLATE, _TOKENS = "tokenizer.chat_template", "tokenizer.ggml.tokens"
# llama.cpp finds what is special about some tokenizers by the model's name.
_COPIED = ("tokenizer.", "general.name", "general.basename")
_WIDTH, _ALIGNMENT = 32, 32
_F32, _F16 = 0, 1  # ggml's types of tensors
_BYTES = {_F32: 4, _F16: 2}
_UINT32, _FLOAT32, _STRING = 4, 6, 8  # the format's types of values
_SIZES = {
    "context_length": 32, "embedding_length": _WIDTH, "block_count": 1, "feed_forward_length": _WIDTH,
    "attention.head_count": 1, "attention.head_count_kv": 1, "rope.dimension_count": _WIDTH,
}  # fmt: skip
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def read_tokenizer_model(path: Path) -> SparseGguf:
    """Return `tokenizer_model` of a GGUF on disk.

    Raises:
        ArtifactError: it is damaged, or has no tokenizer.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return tokenizer_model(data)
    except DAMAGED as error:
        raise not_whole(path, error) from None


def tokenizer_model(data: mmap.mmap | bytes, template: str | None = None) -> SparseGguf:
    """Return a model without weights.

    Args:
        data: a whole GGUF, or its header alone.
        template: chat template in place of the GGUF's own.

    Raises:
        ArtifactError: it has no tokenizer.
        ValueError, KeyError, …: it is damaged; see `gguf_metadata.DAMAGED`.
    """
    metadata = MetadataReader(data)
    tokens = metadata.fields.get(_TOKENS)
    count = len(tokens) if isinstance(tokens, list) else tokens
    if not isinstance(count, int) or not count:
        raise ArtifactError("the GGUF has no tokenizer")
    copied = {name: data[span] for name, span in metadata.spans.items() if name.startswith(_COPIED)}
    if template is not None:
        copied = {name: content for name, content in copied.items() if not name.startswith(_TEMPLATE)}
        copied[_TEMPLATE] = _text_field(template)
    return _assemble({**_shape(), **copied}, dict(_tensors(count)))


def _shape() -> dict[str, bytes]:
    sizes = {f"llama.{name}": struct.pack("<II", _UINT32, value) for name, value in _SIZES.items()}
    epsilon = struct.pack("<If", _FLOAT32, 1e-5)
    return {
        "general.architecture": _text_field("llama"),
        **sizes,
        "llama.attention.layer_norm_rms_epsilon": epsilon,
    }


def _tensors(tokens: int) -> Iterator[tuple[str, tuple[tuple[int, ...], int]]]:
    """Yield the name of each tensor, its shape and type."""
    yield "token_embd.weight", ((_WIDTH, tokens), _F16)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        yield f"{name}.weight", ((_WIDTH,), _F32)
    for name in _MATRICES:
        yield f"blk.0.{name}.weight", ((_WIDTH, _WIDTH), _F16)


def _assemble(fields: dict[str, bytes], tensors: dict[str, tuple[tuple[int, ...], int]]) -> SparseGguf:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for name, content in fields.items():
        parts += [_text(name), content]
    offset = 0
    for name, (shape, kind) in tensors.items():
        parts += [_text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)]
        offset += math.prod(shape) * _BYTES[kind]  # a multiple of the alignment, as a row is
    content = b"".join(parts)
    padded = content + bytes(-len(content) % _ALIGNMENT)
    return SparseGguf(padded, len(padded) + offset)


def _text_field(text: str) -> bytes:
    return struct.pack("<I", _STRING) + _text(text)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
