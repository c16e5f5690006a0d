"""A conversation with a model in Ollama."""

from __future__ import annotations

from collections.abc import Generator

from kolotune.foundation.typed_storage import JsonObject

from .client import OllamaClient
from .model_name import check_name
from .parameters import Options


class OllamaChat:
    """A conversation that remembers its turns.

    Args:
        name: of the model.
        system: system prompt; None for the model's own.
        client: None for the server that OLLAMA_HOST names.
    """

    def __init__(self, name: str, system: str | None = None, client: OllamaClient | None = None) -> None:
        self._name, self._client = check_name(name), client or OllamaClient()
        self._messages = [{"role": "system", "content": system}] if system is not None else []

    @property
    def turns(self) -> list[JsonObject]:
        """The turns so far; the model's own system prompt is not among them."""
        return [dict(turn) for turn in self._messages]

    def ask(
        self, text: str, *, temperature: float | None = None, max_tokens: int | None = None, seed: int | None = None
    ) -> Generator[str]:
        """Yield the answer to `text` in pieces; the model's own parameters apply where None is given.

        Raises:
            OllamaDownError, OllamaError: there is no server or no such model, or the answer is interrupted.
        """
        values = {"temperature": temperature, "num_predict": max_tokens, "seed": seed}
        options: Options = {name: value for name, value in values.items() if value is not None}
        messages = [*self._messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        for piece in self._client.chat(self._name, messages, options):
            pieces.append(piece)
            yield piece
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
