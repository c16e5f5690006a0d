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
# Of fewer than four bits a weight: which weights matter decides a good part of what is lost.
GAINS_FROM_IMPORTANCE_MATRIX = frozenset({"Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ3_S", "IQ3_M"})
# Whose numbers come of the weights alone.
_IGNORES_IMPORTANCE_MATRIX = frozenset({"BF16", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4_MOE", "Q1_0", "Q2_0"})
# Where a row of weights is no whole number of blocks llama.cpp takes a wider type, but for these it knows none.
WHOLE_BLOCKS_ONLY: dict[str, int] = {"Q1_0": 128}
NONE = "NONE"


def canonical_name(name: str) -> str:
    """Return the name of a quantization in capitals; f16 is another name for none."""
    return NONE if name.upper() == "F16" else name.upper()


def made_with_matrix(name: str, choice: str) -> bool:
    """Whether quantization `name` is made with an importance matrix where `Config.importance_matrix` is `choice`."""
    if name not in FILE_TYPES or choice == "never":
        return False
    if choice == "always":
        return name not in _IGNORES_IMPORTANCE_MATRIX
    return name in NEEDS_IMPORTANCE_MATRIX | GAINS_FROM_IMPORTANCE_MATRIX


def problem_with(name: str) -> str:
    """Why `name` (in capitals) can't be a quantization here; an empty string when it can."""
    if name == NONE or name in FILE_TYPES:
        return ""
    return f"{name!r} is no quantization that llama.cpp knows; known: none, {', '.join(sorted(FILE_TYPES))}"
