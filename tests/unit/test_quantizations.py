"""The table of quantizations, held against the library's own constants."""

from __future__ import annotations

import llama_cpp
import pytest

from kolotune.quantizations import FILE_TYPES, NEEDS_IMPORTANCE_MATRIX, NONE, problem_with

PREFIX = "LLAMA_FTYPE_MOSTLY_"


def test_the_table_is_the_library_s() -> None:
    library = {name.removeprefix(PREFIX): getattr(llama_cpp, name) for name in dir(llama_cpp) if PREFIX in name}
    assert library.pop("F16") == 1  # that is "none" here: the converter writes it
    assert library.pop("NVFP4") == 39  # has a number, but llama_model_quantize calls it invalid (see the slow test)
    assert library == FILE_TYPES


def test_what_needs_a_matrix_is_in_the_table() -> None:
    assert set(FILE_TYPES) > NEEDS_IMPORTANCE_MATRIX


@pytest.mark.parametrize("name", [NONE, *sorted(set(FILE_TYPES) - NEEDS_IMPORTANCE_MATRIX)])
def test_usable(name: str) -> None:
    assert problem_with(name) == ""


@pytest.mark.parametrize("name", sorted(NEEDS_IMPORTANCE_MATRIX))
def test_an_importance_matrix_is_named_with_a_way_out(name: str) -> None:
    told = problem_with(name)
    assert name in told and "importance matrix" in told and "Q2_K" in told


@pytest.mark.parametrize("name", ["Q4_K_X", "q4_k_m", "", "F16"])
def test_unknown(name: str) -> None:
    told = problem_with(name)
    assert "Q4_K_M" in told and "none" in told and not any(f" {each}," in told for each in NEEDS_IMPORTANCE_MATRIX)
