"""Which versions of Ollama work, and what is missing in older ones."""

from __future__ import annotations

import re

from kolotune.foundation.errors import OllamaError
from kolotune.foundation.reporter import Reporter

from .client import OllamaClient
from .modelfile import ModelDescription

_OLDEST = (0, 5, 5)  # its create accepts files by digest, and texts as JSON
_READS_JINJA = (0, 30, 0)  # before, a model without TEMPLATE gets no template at all unless Ollama knows it
_MEMORY_LEAK_FIXED = (0, 17, 1)


def release_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, for comparing; empty for builds that have none (0.0.0)."""
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    numbers = tuple(int(part) for part in match.groups()) if match else ()
    return numbers if any(numbers) else ()


def check_version(client: OllamaClient, description: ModelDescription, reporter: Reporter) -> None:
    """Check a server's version; warn about what it lacks for this model.

    Raises:
        OllamaError: it is too old.
    """
    version = client.version()
    numbers = release_numbers(version)
    if not numbers:
        reporter.note(f"Ollama at {client.url} does not report its version ({version or 'nothing'})")
        return
    if numbers < _OLDEST:
        raise OllamaError(
            f"Ollama at {client.url} is {version}; kolotune needs {_format(_OLDEST)} or newer",
            "Update it; the newest version is on ollama.com.",
        )
    if numbers < _MEMORY_LEAK_FIXED:
        reporter.warning(
            f"Ollama {version} has a security hole: anyone who can reach it can read its memory through /api/create; "
            f"{_format(_MEMORY_LEAK_FIXED)} fixes it"
        )
    if description.template is None and numbers < _READS_JINJA:
        reporter.warning(
            f"this model's template can't be written for Ollama, and Ollama {version} does not read the one in the "
            f"GGUF, so the model may ramble; {_format(_READS_JINJA)} reads it"
        )


def _format(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
