"""Sizes of quantizations, compared with the files, and the measured times."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.quantizing import MODELS

from kolotune.gguf import header
from kolotune.gguf.conversion_plan import ConversionPlan
from kolotune.gguf.quantized_sizes import QuantizedSize, quantized_sizes
from kolotune.gguf.quantizer import quantize
from kolotune.gguf.type_choices import weight_count

NAMES = ("Q8_0", "Q4_0", "Q4_K_M", "BF16", "MXFP4_MOE", "IQ4_XS")


def plan_of(gguf: Path) -> ConversionPlan:
    """As much of a plan as sizes depend on."""
    content = gguf.read_bytes()
    return ConversionPlan(content[: header.read_whole(content, gguf).start], ())


@pytest.mark.parametrize("model", ["llama", "576 columns", "8 experts"])
def test_sizes_are_those_of_the_files(model: str, tmp_path: Path) -> None:
    source = MODELS[model].write(tmp_path / "source.gguf", "bf16")
    for matrix, with_matrix in (({}, ()), (MODELS[model].importance(), NAMES)):
        sizes = quantized_sizes(plan_of(source), NAMES, with_matrix, tmp_path, tmp_path / "log")
        for name in NAMES:
            quantize(source, tmp_path / "target.gguf", name, matrix)
            assert sizes[name].size == (tmp_path / "target.gguf").stat().st_size, name
            assert (sizes[name].seconds > 0) == (name != "BF16")


def test_what_does_not_fit_the_model_is_missing(tmp_path: Path) -> None:
    source = MODELS["100 columns"].write(tmp_path / "source.gguf", "f16")
    sizes = quantized_sizes(plan_of(source), ("Q1_0", "Q4_K_M"), (), tmp_path, tmp_path / "log")
    quantize(source, tmp_path / "target.gguf", "Q4_K_M", {})
    assert sizes == {"Q4_K_M": QuantizedSize((tmp_path / "target.gguf").stat().st_size, 0.0)}


def test_a_budget_is_the_size_or_a_bound_of_it(tmp_path: Path) -> None:
    source = MODELS["llama"].write(tmp_path / "source.gguf", "f16")
    whole = source.stat().st_size
    names = ("AUTO-4BPW", "AUTO-9GB", "AUTO-KL0.1", "Q8_0")
    sizes = quantized_sizes(plan_of(source), names, (), tmp_path, tmp_path / "log")
    weights = weight_count(header.read(source))
    assert sizes["AUTO-4BPW"].size == len(plan_of(source).header) + weights // 2
    assert whole <= sizes["AUTO-9GB"].size < whole + 1000
    assert sizes["AUTO-KL0.1"] == sizes["Q8_0"]


def test_times_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(MODELS["llama"].write(tmp_path / "source.gguf", "f16"))
    first = quantized_sizes(plan, ("Q8_0",), (), tmp_path, tmp_path / "log")
    monkeypatch.setattr("kolotune.runners.child_process.run", lambda *_, **__: pytest.fail("measured again"))
    assert quantized_sizes(plan, ("Q8_0",), (), tmp_path, tmp_path / "log") == first
