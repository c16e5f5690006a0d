"""Quantizes a GGUF. Runs as a process of its own, because the library may abort: ``python -m … IN OUT TYPE``."""

from __future__ import annotations

import ctypes
import sys

from ..quantizations import FILE_TYPES
from ..runners.watchdog import end_with_parent


def main(arguments: list[str]) -> int:
    """Quantizes file IN to file OUT as TYPE; 0 when the library says that it worked."""
    end_with_parent()
    source, target, name = arguments
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[name]
    result = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    return int(result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
