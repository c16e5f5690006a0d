"""Model folders with the blocks of a quantized GGUF, made by ggml without a GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from kolotune.gguf import header
from kolotune.gguf.stored_values import dequantized
from kolotune.llamacpp import ggml
from kolotune.weights import stored_blocks
from kolotune.weights.safetensors_header import make_header
from kolotune.weights.stored_blocks import StoredMatrix


def quantize_folder(folder: Path, types: Mapping[str, str]) -> None:
    """Quantize matrices of a model folder: their blocks are written, and the weights replaced by their values.

    Args:
        folder: has one file of weights in fp32.
        types: by the ends of names; others stay as they are.
    """
    weights, matrices, data = load_file(folder / "model.safetensors"), [], []
    for name, weight in weights.items():
        kind = next((kind for end, kind in types.items() if name.endswith(f"{end}.weight")), None)
        if kind is not None:
            matrices.append(StoredMatrix.of(name, kind, len(weight), header.size_of(weight.shape[1:], kind)))
            data.append(_quantized(weight.numpy(), kind))
            weights[name] = torch.from_numpy(dequantized(data[-1], kind)).view(weight.shape)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    content = make_header([matrix.entry for matrix in matrices]) + b"".join(each.tobytes() for each in data)
    (folder / stored_blocks.FILE).write_bytes(content)


def _quantized(values: np.ndarray, kind: str) -> np.ndarray:
    values = np.ascontiguousarray(values)
    data = np.empty(header.size_of(values.shape, kind), np.uint8)
    pointers = values.ctypes.data, data.ctypes.data
    ggml.library().ggml_quantize_chunk(header.type_number(kind), *pointers, 0, *values.shape, None)
    return data
