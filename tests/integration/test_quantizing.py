"""Our quantizer against llama.cpp's own: the same types, and the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.llamacpp_quantizer import LlamaCppQuantizer, llamacpp_quantizer
from support.quantizing import MODELS, TinyModel, described, recorded_choices

from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.quantization_types import FILE_TYPES
from kolotune.gguf import header, importance_matrix, quantizer
from kolotune.gguf.run_matrix import make_matrix

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # the first one compiles llama.cpp
Matrix = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def llamacpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppQuantizer]:
    with llamacpp_quantizer(tmp_path_factory.mktemp("llamacpp")) as started:
        yield started


@pytest.mark.parametrize("name", MODELS)
def test_the_recorded_choices_are_llama_cpps(name: str, llamacpp: LlamaCppQuantizer, tmp_path: Path) -> None:
    source = MODELS[name].write(tmp_path / "model.gguf", "f16")
    summary, matrix = header.read(source), MODELS[name].importance()
    chosen: dict[str, dict[str, str]] = {}
    for file_type in FILE_TYPES:
        for ending, used in (("", {}), (" with a matrix", matrix)):
            types = llamacpp.types(source, file_type, used)
            if types is not None and described(types, summary) != chosen.get(file_type):
                assert types.keys() == summary.tensors.keys()
                chosen[file_type + ending] = described(types, summary)
    assert chosen == recorded_choices()[name]


def test_nvfp4_is_rightly_missing(llamacpp: LlamaCppQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When llama.cpp learns it, the table gets a line."""
    monkeypatch.setitem(FILE_TYPES, "NVFP4", 39)
    assert llamacpp.types(MODELS["llama"].write(tmp_path / "model.gguf", "f16"), "NVFP4", {}) is None


@pytest.mark.parametrize("gguf_type", ["f16", "bf16", "f32"])
@pytest.mark.parametrize(
    "name", ["llama, tied, shared keys", "576 columns", "100 columns", "8 experts", "qwen2", "phi3", "falcon", "mamba"]
)
def test_tiny_models_are_quantized_to_the_same_bytes(
    name: str, gguf_type: str, llamacpp: LlamaCppQuantizer, tmp_path: Path
) -> None:
    model = MODELS[name]
    source = model.write(tmp_path / "model.gguf", gguf_type)
    compared = [_compare(source, kind, used, llamacpp) for kind in FILE_TYPES for used in ({}, model.importance())]
    assert sum(compared) >= len(FILE_TYPES)


def test_many_rows_are_quantized_in_pieces(llamacpp: LlamaCppQuantizer, tmp_path: Path) -> None:
    """Experts of more rows than a thread quantizes at once, none of them whole pieces."""
    rows, columns = 2 * quantizer.WEIGHTS_AT_ONCE // 256 + 3, 256
    model = TinyModel(layers=1, experts=2, more={"blk.0.ffn_gate_up_exps.weight": (2, rows, columns)})
    source = model.write(tmp_path / "model.gguf", "bf16")
    for file_type in ("Q4_K_M", "IQ4_XS", "Q8_0"):
        for used in ({}, model.importance()):
            assert _compare(source, file_type, used, llamacpp)


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_the_sample_is_quantized_to_the_same_bytes(
    file_type: str, smollm2_run: Any, sample_matrix: Matrix, llamacpp: LlamaCppQuantizer, tmp_path: Path
) -> None:
    source = tmp_path / "sample.gguf"
    source.hardlink_to(smollm2_run.run.gguf)
    compared = [_compare(source, file_type, used, llamacpp) for used in ({}, sample_matrix)]
    assert any(compared) or file_type == "Q1_0"


@pytest.fixture(scope="module")
def sample_matrix(smollm2_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """What the sample's importance matrix says."""
    folder = tmp_path_factory.mktemp("sample")
    target, log = folder / "matrix.gguf", folder / "log"
    make_matrix(smollm2_run.run.gguf, smollm2_run.run.prepared, target, log, smollm2_run.reporter)
    return importance_matrix.read(target)


def _compare(source: Path, file_type: str, matrix: Matrix, llamacpp: LlamaCppQuantizer) -> bool:
    """Compare the files; return False if both quantizers refuse to make one."""
    expected, made = source.with_name("expected.gguf"), source.with_name("made.gguf")
    made.unlink(missing_ok=True)
    is_done = llamacpp.quantize(source, expected, file_type, matrix)
    with suppress(ToolchainError):
        quantizer.quantize(source, made, file_type, matrix)
    assert made.exists() == is_done, file_type
    assert not is_done or made.read_bytes() == expected.read_bytes(), file_type
    return is_done
