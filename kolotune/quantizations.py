"""The quantizations that the pinned llama.cpp makes: name → number of its file type and whether it needs an
importance matrix. Kept as a literal so that a config is checked without loading the library; a test holds it
against the library's own constants. NVFP4 (39) is missing: the library names it, but can't quantize to it."""

from __future__ import annotations

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
# Tried on rows of whole blocks; on narrow models llama.cpp takes other types for some of them, and they get by.
NEEDS_IMPORTANCE_MATRIX = frozenset(
    {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
)
# Where a row of weights is no whole number of blocks llama.cpp takes a wider type, but for these it knows none.
WHOLE_BLOCKS_ONLY: dict[str, int] = {"Q1_0": 128}
NONE = "NONE"


def problem_with(name: str) -> str:
    """Why `name` (in capitals) can't be a quantization here; an empty string when it can."""
    if name == NONE or (name in FILE_TYPES and name not in NEEDS_IMPORTANCE_MATRIX):
        return ""
    if name in NEEDS_IMPORTANCE_MATRIX:
        return f"{name} needs an importance matrix, which kolotune does not make yet; Q2_K or IQ3_S are next in size"
    usable = sorted(set(FILE_TYPES) - NEEDS_IMPORTANCE_MATRIX)
    return f"{name!r} is no quantization that llama.cpp knows; known: none, {', '.join(usable)}"
