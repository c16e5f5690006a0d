"""llama.cpp: the toolchain, GGUF files, conversion, quantization and inference."""

from .toolchain import Toolchain, ensure, find, templates_folder

__all__ = ["Toolchain", "ensure", "find", "templates_folder"]
