"""fp32 to f16 with the bits of numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kolotune.foundation import shared_libraries
from kolotune.foundation.errors import ToolchainError
from kolotune.weights import float16


@pytest.fixture(autouse=True)
def cleared_cache() -> Any:
    float16._ggml_function.cache_clear()
    yield
    float16._ggml_function.cache_clear()


def test_the_library_has_the_function() -> None:
    assert float16._ggml_function() is not None


@given(arrays.arrays(np.uint32, st.integers(0, 300)))
def test_agrees_with_numpy_for_any_bits(bits: Any) -> None:
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16)
    assert np.array_equal(float16.from_f32(values).view(np.uint16), expected.view(np.uint16))


def test_slices_of_a_matrix() -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    for part in (values, values[:, 1:4], values.T, values[:0]):
        assert np.array_equal(float16.from_f32(part), part.astype(np.float16))
        assert float16.from_f32(part).flags["C_CONTIGUOUS"]


def test_the_slower_function_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where code for processors is in separate files, only this one can be found."""
    monkeypatch.setattr(float16, "_NAMES", float16._NAMES[1:])
    assert float16._ggml_function() is not None


def test_numpy_without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> tuple[()]:
        raise ToolchainError("not here")

    monkeypatch.setattr(shared_libraries, "load", load)
    assert float16._ggml_function() is None
    assert float16.from_f32(np.float32([1.5, 1e-7])).tolist() == np.float16([1.5, 1e-7]).tolist()


def test_a_function_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float16, "_NAMES", ("ggml_fp32_to_bf16_row",))
    assert float16._ggml_function() is None
