"""Budgets are read in any spelling, have one name that is fit for files, and bad ones are explained."""

from __future__ import annotations

import pytest

from kolotune.foundation.quantization_budgets import Budget, read_budget
from kolotune.foundation.quantization_types import canonical_name, find_problem, is_made_with_matrix


@pytest.mark.parametrize(
    ("given", "name", "budget"),
    [
        ("auto:90MB", "AUTO-90MB", Budget(size=90_000_000)),
        ("auto:090.50mb", "AUTO-90.5MB", Budget(size=90_500_000)),
        ("Auto:1.2GiB", "AUTO-1.2GIB", Budget(size=1_288_490_188)),
        ("auto:4.50bpw", "AUTO-4.5BPW", Budget(bits=4.5)),
        ("auto:kl=0.0200", "AUTO-KL0.02", Budget(kl=0.02)),
        ("auto:kl=0.00001", "AUTO-KL0.00001", Budget(kl=1e-5)),
    ],
)
def test_a_budget_has_one_name(given: str, name: str, budget: Budget) -> None:
    assert canonical_name(given) == name == canonical_name(name)
    assert read_budget(name) == budget and find_problem(name) == ""
    assert is_made_with_matrix(name, "auto") and not is_made_with_matrix(name, "never")


def test_bits_are_of_all_weights() -> None:
    assert Budget(bits=4.0).bytes_of(1000, 20) == 520 and Budget(size=7).bytes_of(1000, 20) == 7
    assert Budget(kl=0.1).bytes_of(1000, 20) is None


@pytest.mark.parametrize(
    "given",
    ["auto", "auto:", "auto:90", "auto:0MB", "auto:kl=0", "auto:kl=1.5", "auto:1.2.3MB", "auto:99bpw", "auto:-5MB"],
)
def test_what_is_no_budget_is_answered_with_the_syntax(given: str) -> None:
    name = canonical_name(given)
    assert read_budget(name) is None
    assert "auto:90MB" in find_problem(name) and "auto:kl=0.02" in find_problem(name)


def test_a_type_that_only_begins_alike_is_an_unknown_type() -> None:
    assert "not a quantization of llama.cpp" in find_problem("AUTOMATIC")
