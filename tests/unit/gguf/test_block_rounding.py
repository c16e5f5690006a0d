"""The compiled kernel rounds as PyTorch does, but for the order in which errors are added up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.quantizing import matrix_and_inputs

from kolotune.gguf import block_rounding, error_feedback
from kolotune.gguf.block_layouts import block_layouts
from kolotune.gguf.block_rounding import LIBRARY, CompiledRounding, PlainRounding
from kolotune.gguf.error_feedback import input_statistics, round_with_feedback

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(LIBRARY.reason_unavailable()), reason=f"can't compile: {LIBRARY.reason_unavailable()}"),
]


def rounded(kind: str, by: Any, monkeypatch: pytest.MonkeyPatch, columns: int = 512, rows: int = 48) -> Any:
    weights, inputs = matrix_and_inputs(columns)
    monkeypatch.setattr(error_feedback, "column_rounding", by)
    blocks, values = round_with_feedback(weights[:rows], kind, input_statistics(inputs))
    return blocks, float(((values - weights[:rows]) @ inputs.T).square().mean())


def compiled(matrix: block_rounding.RoundedMatrix) -> CompiledRounding:
    return CompiledRounding(block_rounding.feedback_kernel(), matrix)


@pytest.mark.parametrize("kind", sorted(block_layouts()))
def test_both_round_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in another order may round one weight otherwise, and then those that make it good; it is as good."""
    blocks, error = rounded(kind, compiled, monkeypatch)
    plain, plain_error = rounded(kind, PlainRounding, monkeypatch)
    assert (blocks == plain).all(axis=1).mean() > 0.8
    assert error == pytest.approx(plain_error, rel=0.02)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "IQ4_XS"])
def test_a_row_does_not_depend_on_the_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, _ = rounded(kind, compiled, monkeypatch)
    some, _ = rounded(kind, compiled, monkeypatch, rows=35)
    np.testing.assert_array_equal(blocks[:35], some)


def test_without_a_compiler_pytorch_rounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    block_rounding.feedback_kernel.cache_clear()
    try:
        _, inputs = matrix_and_inputs(64)
        importance = input_statistics(inputs).importance
        chosen = block_rounding.column_rounding(block_rounding.RoundedMatrix.empty(3, "Q4_0", importance))
        assert isinstance(chosen, PlainRounding)
    finally:
        block_rounding.feedback_kernel.cache_clear()
