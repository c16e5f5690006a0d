"""What is installed: the client alone, or all of kolotune; and how to install the rest.

The client (no PyTorch) starts jobs on other machines and speaks to Docker and Ollama. Everything that reads chats,
weights or GGUFs needs the packages of the extra ``local``.
"""

from __future__ import annotations

import importlib.util

from .errors import ToolchainError

CONVERTER_PACKAGE, CONVERTER_VERSION = "llama-cpp-python", "0.3.36"
"""The package whose source archive has llama.cpp's converter; it is never installed."""


def install_command(extra: str) -> str:
    """Return how to install an extra: the one place that changes on the day that kolotune is on a package index."""
    return f"in your clone of kolotune, run: pip install '.[{extra}]'"


INSTALL_LOCAL = install_command("local")
LOCAL_PACKAGES = (
    "gguf", "jinja2", "matplotlib", "numpy", "psutil", "pyarrow", "safetensors", "starlette", "tokenizers",
    "torch", "transformers", "uvicorn", "xllamacpp",
)  # fmt: skip


def missing_packages() -> list[str]:
    """Return the packages of the extra ``local`` that are not installed; none is imported to find out."""
    return [name for name in LOCAL_PACKAGES if importlib.util.find_spec(name) is None]


def version_in_use(package: str) -> str | None:
    """Return the version of a package that results depend on; None when it is not installed."""
    if package == CONVERTER_PACKAGE:
        return CONVERTER_VERSION
    import importlib.metadata  # with the parser of e-mail, a megabyte in each worker that reads chats

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_local(verb: str) -> None:
    """Check that everything is installed that `verb` may need, before it does anything.

    Raises:
        ToolchainError: this is the client alone.
    """
    missing = missing_packages()
    if missing:
        raise ToolchainError(
            f"{verb} needs the full installation; missing here: {', '.join(missing)}",
            f"To install it, {INSTALL_LOCAL}. Or run it elsewhere: --container, or `kolotune launch`.",
        )
