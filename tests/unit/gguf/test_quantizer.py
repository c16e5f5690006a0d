"""Quantized files: their bytes, what is refused, and what a failure leaves."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from support.llamacpp_writer import is_kept
from support.quantizing import MODELS, TinyModel

from kolotune.foundation.errors import ArtifactError, SpaceError, ToolchainError
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import header
from kolotune.gguf.quantize import quantize_file
from kolotune.gguf.quantizer import WEIGHTS_AT_ONCE, quantize

SOURCES = (("llama, tied, shared keys", "f16"), ("8 experts", "bf16"), ("576 columns", "f32"), ("100 columns", "bf16"))
# Of what llama.cpp makes of these, without and with an importance matrix. Other types need tables that take long to
# make; slow tests compare all types with llama.cpp itself.
HASHES = {
    "Q4_0": "57d404025f335002",
    "Q4_1": "8b23f285dad16984",
    "Q8_0": "493ce8a0d0e8c64e",
    "Q5_0": "e875b35b10ede180",
    "Q5_1": "74303a02a03443da",
    "Q2_K": "b9533f749d8d94fb",
    "Q3_K_S": "e6d67ba7d348cd2d",
    "Q3_K_M": "a640efe110d5584a",
    "Q3_K_L": "1f79daa7837274ba",
    "Q4_K_S": "f6dd54599ddbe32f",
    "Q4_K_M": "922478a3ee38bbf2",
    "Q5_K_S": "fc96b11827fb9780",
    "Q5_K_M": "e695b67934dbb8e4",
    "Q6_K": "8083bf8e60a2862b",
    "IQ4_NL": "f268daedcb272636",
    "IQ4_XS": "eea15be43608e12d",
    "BF16": "292160ad027a9dd8",
    "TQ1_0": "5b247840bead88ad",
    "TQ2_0": "ee579260e444a759",
    "MXFP4_MOE": "c70aeb13395f0c98",
    "Q2_0": "865c47744d8d80bf",
}


@pytest.mark.parametrize("file_type", HASHES)
def test_the_bytes_are_llama_cpps(file_type: str, tmp_path: Path) -> None:
    total = hashlib.sha256()
    for name, gguf_type in SOURCES:
        source = MODELS[name].write(tmp_path / "source.gguf", gguf_type)
        for matrix in ({}, MODELS[name].importance()):
            digest = quantize(source, tmp_path / "target.gguf", file_type, matrix)
            content = (tmp_path / "target.gguf").read_bytes()
            assert digest == hashlib.sha256(content).hexdigest()
            total.update(content)
    assert total.hexdigest()[:16] == HASHES[file_type]
    assert is_kept(tmp_path / "target.gguf")


def test_pieces_leave_no_trace(tmp_path: Path) -> None:
    """Experts of more rows than are quantized at once: each row is what it is in a model of this row alone."""
    rows, columns = WEIGHTS_AT_ONCE // 256 + 3, 256
    name = "blk.0.ffn_up_exps.weight"
    model = TinyModel(layers=1, experts=2, more={name: (2, rows, columns)})
    source = model.write(tmp_path / "model.gguf", "f32")
    matrix = model.importance()
    quantize(source, tmp_path / "made.gguf", "Q4_K_S", matrix)
    whole, made = _data(source, name).view(np.float32), _data(tmp_path / "made.gguf", name)
    size = len(made) // (2 * rows)
    for expert, row in ((0, 0), (0, rows - 1), (1, 0), (1, rows - 1)):
        number = expert * rows + row
        values = np.ascontiguousarray(whole[number * columns : (number + 1) * columns])
        importance = np.ascontiguousarray(matrix[name][expert * columns : (expert + 1) * columns])
        assert bytes(made[number * size : (number + 1) * size]) == _quantized_row(values, "Q4_K", importance)


def _data(path: Path, name: str) -> np.ndarray:
    content = path.read_bytes()
    reader = header.read_whole(content, path)
    tensor = reader.tensors[name]
    return np.frombuffer(content, np.uint8, tensor.size, reader.start + tensor.offset)


def _quantized_row(values: np.ndarray, kind: str, importance: np.ndarray) -> bytes:
    from kolotune.llamacpp import ggml

    result = np.empty(header.size_of((len(values),), kind), np.uint8)
    arguments = (values.ctypes.data, result.ctypes.data, 0, 1, len(values), importance.ctypes.data)
    ggml.library().ggml_quantize_chunk(header.type_number(kind), *arguments)
    return result.tobytes()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return MODELS["8 experts"].write(tmp_path / "source.gguf", "f16")


def test_a_matrix_must_be_there_and_fit(source: Path, tmp_path: Path) -> None:
    target, matrix = tmp_path / "target.gguf", MODELS["8 experts"].importance()
    with pytest.raises(ToolchainError, match="importance matrix"):
        quantize(source, target, "IQ2_XXS", {})
    incomplete = {name: mean for name, mean in matrix.items() if name != "blk.1.ffn_up_exps.weight"}
    with pytest.raises(ToolchainError, match=r"blk\.1\.ffn_up_exps"):
        quantize(source, target, "IQ2_XXS", incomplete)
    with pytest.raises(ArtifactError, match="256 columns"):
        quantize(source, target, "Q4_0", matrix | {"blk.1.ffn_up_exps.weight": np.ones(256, np.float32)})
    assert not target.exists()
    quantize(source, target, "Q4_0", incomplete | {"token_embd.weight": np.ones(3, np.float32)})


def test_what_can_t_be_quantized_is_refused(source: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    log, target = tmp_path / "log", tmp_path / "target.gguf"
    quantize_file(source, target, "Q4_0", log, reporter)
    before = target.read_bytes()
    content = bytearray(source.read_bytes())
    content[-2:] = b"\xff\x7f"  # the last weight is no number
    (tmp_path / "damaged.gguf").write_bytes(content)
    (tmp_path / "short.gguf").write_bytes(content[:-40])
    for path, reason in (
        (target, "quantized already"),
        (tmp_path / "damaged.gguf", "no numbers"),
        (tmp_path / "short.gguf", "truncated"),
    ):
        with pytest.raises(ArtifactError, match=reason):
            quantize_file(path, target, "Q8_0", log, reporter)
    assert target.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "source.gguf", "target.gguf", "damaged.gguf", "short.gguf", "log",
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_is_called_full(source: Path) -> None:
    with pytest.raises(SpaceError, match="full"):
        quantize(source, Path("/dev/full"), "Q8_0", {})


def test_the_hash_is_known_without_reading(source: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    target, hasher = tmp_path / "target.gguf", Hasher(tmp_path / "hashes.json")
    quantize_file(source, target, "Q4_K_M", tmp_path / "log", reporter, hasher=hasher)
    hasher.save()
    assert hashlib.sha256(target.read_bytes()).hexdigest() in (tmp_path / "hashes.json").read_text(encoding="utf-8")
