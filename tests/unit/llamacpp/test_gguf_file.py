"""Reading back GGUFs: whole ones, and ones that are damaged."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from kolotune.errors import ArtifactError
from kolotune.llamacpp import gguf_file


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_add_bos_token(False)
    writer.add_array("tokenizer.ggml.tokens", [f"t{number}" for number in range(200)])
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.arange(64 * 32, dtype=np.float32).reshape(64, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_a_whole_file_says(whole: Path) -> None:
    summary = gguf_file.read(whole)
    assert summary.architecture == "llama"
    assert summary.tensors["output.weight"] == ((32, 64), "F32", 64 * 32 * 4)
    assert summary.fields["tokenizer.ggml.add_bos_token"] is False
    assert summary.fields["tokenizer.ggml.tokens"] == 200


@pytest.mark.parametrize("part", range(20))
def test_cut_anywhere(whole: Path, part: int) -> None:
    data = whole.read_bytes()
    # The last bytes are padding behind the last tensor: what counts is cut before them.
    whole.write_bytes(data[: int((len(data) - 64) * part / 20)])
    with pytest.raises(ArtifactError):
        gguf_file.read(whole)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"GGML"),
        (4, struct.pack("<I", 99)),
        (8, struct.pack("<Q", 2**60)),
        (16, struct.pack("<Q", 2**60)),
        (0, bytes(64)),
    ],
    ids=["magic", "version", "tensor count", "key count", "zeroed header"],
)
def test_damaged_headers(whole: Path, offset: int, value: bytes) -> None:
    data = bytearray(whole.read_bytes())
    data[offset : offset + len(value)] = value
    whole.write_bytes(data)
    with pytest.raises(ArtifactError):
        gguf_file.read(whole)


def test_mutations_never_raise_anything_else(whole: Path) -> None:
    original = whole.read_bytes()
    dice = random.Random(7)
    header = 4000
    for _ in range(150):
        data = bytearray(original)
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(header)] = dice.randrange(256)
        whole.write_bytes(data)
        try:
            gguf_file.read(whole)
        except ArtifactError:
            continue


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        gguf_file.read(tmp_path / "none.gguf")
