"""The quantizations of the pinned llama.cpp: their file types, and which of them use an importance matrix.

The table is a literal so that options are checked without loading anything; a test compares it with the converter's
constants. NVFP4 (39) is missing: llama.cpp names it but cannot quantize to it.
"""

from __future__ import annotations

from .quantization_budgets import SYNTAX, canonical_budget, names_budget, read_budget

FILE_TYPES: dict[str, int] = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "Q2_K_S": 21,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4_MOE": 38,
    "Q1_0": 40,
    "Q2_0": 41,
}
# Tested with rows of whole blocks. In narrow models llama.cpp replaces some of these types, and no matrix is needed.
NEEDS_IMPORTANCE_MATRIX = frozenset(
    {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
)
# Under four bits a weight, the matrix reduces the loss of quality noticeably.
GAINS_FROM_IMPORTANCE_MATRIX = frozenset({"Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ3_S", "IQ3_M"})
# llama.cpp computes these from the weights alone.
_IGNORES_IMPORTANCE_MATRIX = frozenset({"BF16", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4_MOE", "Q1_0", "Q2_0"})
# Block size, in weights. Other types are replaced by a wider one if a row is not whole blocks; for these there is none.
WHOLE_BLOCKS_ONLY: dict[str, int] = {"Q1_0": 128}
NONE = "NONE"


def canonical_name(name: str) -> str:
    """Return the name of a quantization in capitals; f16 is another name for none, and a budget has one name."""
    return NONE if name.upper() == "F16" else canonical_budget(name.upper())


def is_made_with_matrix(name: str, choice: str) -> bool:
    """Whether quantization `name` is made with an importance matrix if `Config.importance_matrix` is `choice`."""
    if read_budget(name) is not None:
        return choice != "never"
    if name not in FILE_TYPES or choice == "never":
        return False
    if choice == "always":
        return name not in _IGNORES_IMPORTANCE_MATRIX
    return name in NEEDS_IMPORTANCE_MATRIX | GAINS_FROM_IMPORTANCE_MATRIX


def find_problem(name: str) -> str:
    """Return why `name` (in capitals) is not a quantization; an empty string if it is one."""
    if name == NONE or name in FILE_TYPES or read_budget(name) is not None:
        return ""
    if names_budget(name):
        return f"{name.lower()!r} is no budget; write {SYNTAX}"
    names = ", ".join(sorted(FILE_TYPES))
    return f"{name!r} is not a quantization of llama.cpp; choose none, one of {names}, or a budget such as auto:90MB"
