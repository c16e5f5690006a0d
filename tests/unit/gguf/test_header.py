"""Read headers of GGUFs, whole and damaged."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from kolotune.foundation.errors import ArtifactError
from kolotune.gguf import header
from kolotune.gguf.header import GgufTensor
from kolotune.llamacpp import Toolchain


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


def test_summary_of_a_whole_file(whole: Path) -> None:
    summary = header.read(whole)
    assert summary.architecture == "llama"
    assert summary.tensors["output.weight"] == GgufTensor((32, 64), "F32", 64 * 32 * 4, 64 * 32 * 4)
    assert summary.fields["tokenizer.ggml.add_bos_token"] is False
    assert summary.fields["tokenizer.ggml.tokens"] == 200


@pytest.mark.parametrize("part", range(20))
def test_a_truncated_file_is_refused(whole: Path, part: int) -> None:
    data = whole.read_bytes()
    # The last bytes are padding behind the last tensor, so cut before them.
    whole.write_bytes(data[: int((len(data) - 64) * part / 20)])
    with pytest.raises(ArtifactError):
        header.read(whole)


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
def test_a_damaged_header_is_refused(whole: Path, offset: int, value: bytes) -> None:
    data = bytearray(whole.read_bytes())
    data[offset : offset + len(value)] = value
    whole.write_bytes(data)
    with pytest.raises(ArtifactError):
        header.read(whole)


def test_mutations_raise_no_other_error(whole: Path) -> None:
    original = whole.read_bytes()
    dice = random.Random(7)
    for _ in range(150):
        data = bytearray(original)
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(4000)] = dice.randrange(256)
        whole.write_bytes(data)
        try:
            header.read(whole)
        except ArtifactError:
            continue


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        header.read(tmp_path / "none.gguf")


def test_agrees_with_the_gguf_package(whole: Path) -> None:
    reference, summary = gguf.GGUFReader(whole), header.read(whole)
    assert {name: (tensor.shape, tensor.type, tensor.size) for name, tensor in summary.tensors.items()} == {
        tensor.name: (tuple(map(int, tensor.shape)), tensor.tensor_type.name, int(tensor.n_bytes))
        for tensor in reference.tensors
    }
    expected = {name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert summary.fields.keys() == expected.keys()
    for name, value in summary.fields.items():
        assert value == expected[name] or value == len(expected[name]), name


def test_a_vocabulary_alone_is_not_a_model(toolchain: Toolchain) -> None:
    with pytest.raises(ArtifactError, match="holds no model"):
        header.read(toolchain.root / "models" / "ggml-vocab-qwen2.gguf")


def test_all_kinds_of_fields(tmp_path: Path) -> None:
    path = tmp_path / "kinds.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, tuple[str, object]] = {
        "a": ("uint8", 200), "b": ("int8", -100), "c": ("uint16", 60000), "d": ("int16", -30000),
        "e": ("uint32", 4_000_000_000), "f": ("int32", -2_000_000_000), "g": ("float32", 0.5), "h": ("bool", True),
        "i": ("string", "naïve 🎉"), "j": ("uint64", 2**63), "k": ("int64", -(2**62)), "l": ("float64", 0.1),
        "m": ("array", [1, 2, 3]), "n": ("array", ["x", ""]), "o": ("array", [True, False]),
        "p": ("array", [1.5] * 65), "q": ("array", ["ü"] * 65), "r": ("array", [1.5] * 513),
    }  # fmt: skip
    for name, (kind, value) in values.items():
        getattr(writer, f"add_{kind}")(name, value)
    writer.add_tensor("x", np.zeros((2, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = header.read(path).fields
    assert {name: fields[name] for name in values} == {name: value for name, (_, value) in values.items()} | {
        "q": 65, "r": 513
    }  # fmt: skip


def test_a_flag_is_changed_in_place(whole: Path) -> None:
    before = whole.read_bytes()
    header.set_flag(whole, "tokenizer.ggml.add_bos_token", True)
    assert header.read(whole).fields["tokenizer.ggml.add_bos_token"] is True
    assert sum(one != other for one, other in zip(before, whole.read_bytes(), strict=True)) == 1
    for name in ("tokenizer.ggml.add_eos_token", "llama.block_count"):
        header.set_flag(whole, name, False)
    header.set_flag(whole, "tokenizer.ggml.add_bos_token", False)
    assert whole.read_bytes() == before
