"""Quantizes a GGUF: ``python -m … IN OUT TYPE [MATRIX]``. A process of its own, because the library may abort."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from kolotune.foundation.quantization_types import FILE_TYPES
from kolotune.runners.watchdog import end_with_parent


def main(arguments: list[str]) -> int:
    """Quantizes file IN to file OUT as TYPE, by a matrix if there is one; 0 when the library says that it worked."""
    end_with_parent()
    source, target, name, *given = arguments
    import llama_cpp

    from . import importance_matrix

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[name]
    matrix = importance_matrix.read(Path(given[0])) if given else {}
    weighted = importance_matrix.as_parameter(matrix)
    if matrix:
        parameters.imatrix = weighted
    result = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    return int(result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
