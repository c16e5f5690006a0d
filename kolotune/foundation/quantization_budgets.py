"""Quantizations to a budget: ``auto:90MB``, ``auto:4.5bpw`` and ``auto:kl=0.02`` instead of the name of a mixture.

Their canonical names serve as parts of file names: ``AUTO-90MB``, ``AUTO-4.5BPW``, ``AUTO-KL0.02``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"AUTO[:-](?:KL=?(?P<kl>[0-9.]+)|(?P<number>[0-9.]+) ?(?P<unit>KB|MB|GB|KIB|MIB|GIB|BPW))")
_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PREFIX = re.compile(r"AUTO(?![A-Z0-9])")
_SMALLEST_KL, _LARGEST_KL, _LARGEST_BITS = 1e-5, 1.0, 32.0
SYNTAX = "auto:90MB (the file's size), auto:4.5bpw (bits per weight) or auto:kl=0.02 (the mean KL divergence, in nats)"


@dataclass(frozen=True)
class Budget:
    """What a quantization may cost; one of these is given.

    Attributes:
        size: bytes of the file.
        bits: bits per weight, over all tensors, as llama.cpp counts them.
        kl: mean KL divergence from the unquantized GGUF, in nats.
    """

    size: int | None = None
    bits: float | None = None
    kl: float | None = None

    def bytes_of(self, weights: int, header_size: int) -> int | None:
        """Return the bytes that a file of so many weights may have; None where the divergence is bounded."""
        return header_size + int(self.bits * weights / 8) if self.bits is not None else self.size


def names_budget(name: str) -> bool:
    """Whether a name, in capitals, means a budget, well formed or not."""
    return bool(_PREFIX.match(name))


def canonical_budget(name: str) -> str:
    """Return the one name of a budget, in capitals; what is no budget is returned as it is, for the error."""
    budget, match = read_budget(name), _NAME.fullmatch(name)
    if budget is None or match is None:
        return name
    if budget.kl is not None:
        return f"AUTO-KL{budget.kl:.6f}".rstrip("0")
    return f"AUTO-{float(match['number']):.10g}{match['unit']}"


def read_budget(name: str) -> Budget | None:
    """Return the budget that a name in capitals means; None where it means none."""
    match = _NAME.fullmatch(name)
    try:
        if match is None:
            return None
        if match["kl"] is not None:
            kl = float(match["kl"])
            return Budget(kl=kl) if _SMALLEST_KL <= kl <= _LARGEST_KL else None
        number = float(match["number"])
    except ValueError:  # such as 1.2.3
        return None
    if match["unit"] == "BPW":
        return Budget(bits=number) if 0 < number <= _LARGEST_BITS else None
    size = int(number * _BYTES[match["unit"]])
    return Budget(size=size) if size > 0 else None
