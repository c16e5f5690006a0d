"""Which versions of Ollama work, and what is missing in older ones."""

from __future__ import annotations

import contextlib
import re

from kolotune.foundation.errors import ArtifactError, OllamaError
from kolotune.foundation.reporter import Reporter

from .client import OllamaClient
from .prompt_path import READS_JINJA, TemplateSources, Version, find_rule, format_version

_OLDEST = (0, 5, 5)  # its create accepts files by digest, and texts as JSON
_MEMORY_LEAK_FIXED = (0, 17, 1)


def release_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, for comparing; empty for builds that have none (0.0.0)."""
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    numbers = tuple(int(part) for part in match.groups()) if match else ()
    return numbers if any(numbers) else ()


def check_version(client: OllamaClient, sources: TemplateSources, reporter: Reporter) -> Version:
    """Check a server's version; warn about what it lacks for this model.

    Args:
        client: the server.
        sources: what decides how the model is rendered.
        reporter: gets the warnings.

    Returns:
        The numbers of the version; empty when it is unknown.

    Raises:
        OllamaError: it is too old.
    """
    version = client.version()
    numbers = release_numbers(version)
    if not numbers:
        reporter.note(f"Ollama at {client.url} does not report its version ({version or 'nothing'})")
        return ()
    if numbers < _OLDEST:
        raise OllamaError(
            f"Ollama at {client.url} is {version}; kolotune needs {format_version(_OLDEST)} or newer",
            "Update it; the newest version is on ollama.com.",
        )
    if numbers < _MEMORY_LEAK_FIXED:
        reporter.warning(
            f"Ollama {version} has a security hole: anyone who can reach it can read its memory through /api/create; "
            f"{format_version(_MEMORY_LEAK_FIXED)} fixes it"
        )
    if numbers < READS_JINJA:
        _report_unread_template(version, sources, reporter)
    return numbers


def _report_unread_template(version: str, sources: TemplateSources, reporter: Reporter) -> None:
    """Warn about what a server can't do that does not read the template in the GGUF."""
    if sources.template is None:
        # It gets no template at all, unless Ollama knows one that is like it.
        reporter.warning(
            f"this model's template can't be written for Ollama, and Ollama {version} does not read the one in the "
            f"GGUF, so the model may ramble; {format_version(READS_JINJA)} reads it"
        )
    with contextlib.suppress(ArtifactError):
        if find_rule(sources).tools and not find_rule(sources, release_numbers(version)).tools:
            reporter.warning(f"Ollama {version} does not serve this model's tools; {format_version(READS_JINJA)} does")
