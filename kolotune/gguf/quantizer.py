"""Quantize one GGUF: ``python -m … IN OUT TYPE [MATRIX]``. A separate process, because the library may abort."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.quantization_types import FILE_TYPES
from kolotune.llamacpp.log import collect_problems
from kolotune.runners import child_process


def main(arguments: list[str]) -> int:
    """Quantize; return the exit code."""
    return child_process.carry_out(lambda: quantize(*arguments))


def quantize(source: str, target: str, name: str, matrix: str = "") -> None:
    """Quantize the file `source` to the file `target`, with an importance matrix if one is given.

    Raises:
        ToolchainError: the library failed.
        ArtifactError: the matrix can't be read.
    """
    import llama_cpp

    from . import importance_matrix

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[name]
    means = importance_matrix.read(Path(matrix)) if matrix else {}
    entries = importance_matrix.as_parameter(means)
    if means:
        parameters.imatrix = entries
    with collect_problems() as problems:
        code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    if code != 0:
        reason = " ".join(problems)[-1000:] or f"llama.cpp returned {code}"
        raise ToolchainError(f"quantizing to {name} failed: {reason}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
