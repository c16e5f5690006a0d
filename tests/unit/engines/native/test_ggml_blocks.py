"""Values of blocks are ggml's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kolotune.engines.native.ggml_blocks import TYPES, dequantize
from kolotune.gguf import header
from kolotune.gguf.stored_values import dequantized
from kolotune.weights import stored_blocks

# Where a block has numbers in fp16, which must be finite.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)} | {
    "Q6_K": (208,)
}


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_those_of_ggml(kind: str) -> None:
    block, size, _ = TYPES[kind]
    assert (block, size) == header.block_of(kind)
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (192, size), np.uint8)
    for start in HALVES.get(kind, (0,)):
        scales = random.standard_normal((192, 1)).astype(np.float16)
        scales[:8] *= np.float16(1e-6)  # some are too small for a normal number
        blocks[:, start : start + 2] = scales.view(np.uint8)
    expected = torch.from_numpy(dequantized(blocks.reshape(-1), kind)).view(48, -1)
    assert torch.equal(dequantize(torch.from_numpy(blocks).view(48, -1), kind), expected)


def test_all_types_that_a_folder_may_have_are_known() -> None:
    assert TYPES.keys() == stored_blocks.TYPES
