"""Quants that are put into blocks are those that ggml reads: every level, and the ones that ggml chose itself."""

from __future__ import annotations

import numpy as np
import pytest

from kolotune.gguf import header
from kolotune.gguf.block_layouts import block_layouts
from kolotune.gguf.stored_values import dequantized
from kolotune.llamacpp import ggml


@pytest.mark.parametrize("kind", sorted(block_layouts()))
def test_quants_are_where_ggml_reads_them(kind: str) -> None:
    layout, (width, size) = block_layouts()[kind], header.block_of(kind)
    random = np.random.default_rng(0)
    weights = random.standard_normal((6, 512)).astype(np.float32)
    data = np.empty(header.size_of(weights.shape, kind), np.uint8)
    ggml.library().ggml_quantize_chunk(header.type_number(kind), weights.ctypes.data, data.ctypes.data, 0, 6, 512, None)
    blocks = data.reshape(-1, size)

    def values(quants: np.ndarray) -> np.ndarray:
        changed = blocks.copy()
        layout.write(changed, quants.astype(np.uint8))
        return dequantized(changed.reshape(-1), kind).reshape(-1, width)

    levels = np.stack([values(np.full((len(blocks), width), quant)) for quant in range(layout.levels)])
    if layout.is_linear:
        steps = np.diff(levels, axis=0)
        np.testing.assert_allclose(steps, np.broadcast_to(steps[:1], steps.shape), atol=1e-5)
    quants = random.integers(0, layout.levels, (len(blocks), width))
    np.testing.assert_array_equal(values(quants), np.take_along_axis(levels, quants[None], 0)[0])
    chosen = np.abs(levels - dequantized(data, kind).reshape(-1, width)).argmin(axis=0)
    changed = blocks.copy()
    layout.write(changed, chosen.astype(np.uint8))
    np.testing.assert_array_equal(changed, blocks)
