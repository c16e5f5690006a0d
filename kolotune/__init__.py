"""kolotune: from a file of chats to a model that runs in Ollama."""

from __future__ import annotations

__version__ = "0.1.0"
