"""What this machine is good at."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path


def best_device() -> str:
    """ "cuda", "mps" or "cpu": the first that PyTorch can use here."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype() -> str:
    """ "bf16" where products of bf16 matrices are fast, else "fp32".

    Without bf16 instructions a processor computes bf16 by way of fp32, slower than fp32 itself.
    """
    if importlib.util.find_spec("torch") is None:
        return "fp32"
    import torch

    device = best_device()
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device == "cpu" and _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    if platform.system() != "Linux":
        return False
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    words = set(text.split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
