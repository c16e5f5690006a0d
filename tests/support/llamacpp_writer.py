"""llama.cpp's own writer, which servers pass GGUFs through."""

from __future__ import annotations

import ctypes
from pathlib import Path

from kolotune.llamacpp.log import print_only_problems


def copy_gguf(source: Path, target: Path) -> Path:
    """Return what ``llama-quantize SOURCE TARGET COPY`` writes."""
    import llama_cpp

    print_only_problems()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.only_copy = True
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) == 0
    return target


def is_kept(path: Path) -> bool:
    """Whether llama.cpp's writer leaves a GGUF as it is; its copy is written beside it."""
    return copy_gguf(path, path.with_suffix(".copy")).read_bytes() == path.read_bytes()
