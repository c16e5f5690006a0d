"""The table of quantizations, compared with llama.cpp's constants."""

from __future__ import annotations

import re

import pytest

from kolotune.foundation.quantization_types import (
    FILE_TYPES,
    NEEDS_IMPORTANCE_MATRIX,
    NONE,
    find_problem,
    is_made_with_matrix,
)
from kolotune.llamacpp import Toolchain

_CONSTANT = re.compile(r"^    MOSTLY_(\w+) += (\d+)", re.MULTILINE)
CHOICES = ("auto", "always", "never")


def test_the_table_equals_llama_cpps(toolchain: Toolchain) -> None:
    source = (toolchain.root / "gguf-py" / "gguf" / "constants.py").read_text(encoding="utf-8")
    numbers = {name: int(number) for name, number in _CONSTANT.findall(source)}
    assert numbers.pop("F16") == 1  # that is "none" here: the converter writes it
    assert numbers.pop("NVFP4") == 39  # has a number, but llama_model_quantize calls it invalid
    assert numbers == FILE_TYPES


def test_what_needs_a_matrix_is_in_the_table() -> None:
    assert set(FILE_TYPES) > NEEDS_IMPORTANCE_MATRIX


@pytest.mark.parametrize("name", [NONE, *FILE_TYPES])
def test_usable(name: str) -> None:
    assert find_problem(name) == ""


def test_which_are_made_with_a_matrix() -> None:
    by_choice = {
        choice: {name for name in (NONE, *FILE_TYPES) if is_made_with_matrix(name, choice)} for choice in CHOICES
    }
    assert by_choice["never"] == set()
    assert set(FILE_TYPES) > by_choice["always"] > by_choice["auto"] > NEEDS_IMPORTANCE_MATRIX
    assert {"Q4_K_M", "IQ4_XS"} <= by_choice["always"] - by_choice["auto"]
    assert {"Q2_K", "IQ3_M"} <= by_choice["auto"] and not {"Q8_0", "BF16"} & by_choice["always"]


@pytest.mark.parametrize("name", ["Q4_K_X", "q4_k_m", "", "F16"])
def test_unknown(name: str) -> None:
    problem = find_problem(name)
    assert "Q4_K_M" in problem and "none" in problem and "IQ1_S" in problem
