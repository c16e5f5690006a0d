"""Values of a GGUF's tensors are those that the gguf package reads."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from kolotune.foundation.errors import ArtifactError
from kolotune.gguf.stored_values import StoredValues


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_values_are_read_as_gguf_reads_them(kind: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    random = np.random.default_rng(0)
    data = np.zeros((6, 512 // block * size), np.uint8)
    if kind in ("F32", "F16"):
        data = random.standard_normal((6, 512)).astype(np.float32 if kind == "F32" else np.float16).view(np.uint8)
    elif kind != "BF16":
        data = random.integers(0, 60, data.shape, np.uint8)  # small bytes: no exponent is infinite
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.a.weight", np.ascontiguousarray(data).reshape(6, -1), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with StoredValues(tmp_path / "m.gguf") as values:
        read = list(values.blocks("blk.0.a.weight"))
    assert [rows for rows, _ in read] == [slice(0, 6)]
    expected = gguf.quants.dequantize(data.reshape(6, -1), number).reshape(6, 512)
    np.testing.assert_array_equal(read[0][1], expected)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0\0damaged")
    with pytest.raises(ArtifactError):
        StoredValues(tmp_path / "m.gguf")
