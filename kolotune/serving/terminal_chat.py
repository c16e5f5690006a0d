"""Chat with a run's result, or with its base model in the same way, through llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kolotune.chats.tokens.tokenizer import template_of
from kolotune.chats.tokens.trained_template import trained_folder
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import Reporter
from kolotune.gguf.inference import GgufModel
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import choose_quantization, saved_config, verified_gguf
from kolotune.stages import modelfile

from .base_gguf import base_gguf


class TerminalChat:
    """A conversation that remembers its turns and writes them with the trained template.

    Args:
        model: the model that answers.
        tokenizer: folder with the tokenizer and the trained template.
        stops: stop strings.
        system: system prompt, or None.
    """

    def __init__(self, model: GgufModel, tokenizer: Path, stops: tuple[str, ...], system: str | None) -> None:
        self._model, self._stops = model, stops
        self._template = template_of(tokenizer)
        self._messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, *, temperature: float, max_tokens: int, seed: int) -> Iterator[str]:
        """Yield the answer to `text` in pieces.

        Raises:
            ConfigError: the conversation exceeds the model's context.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt = self._model.tokens(self._template.render(messages, None, True))
        free = self._model.context - len(prompt)
        if free < 1:
            raise ConfigError("the conversation is longer than the model's context", "Start a new chat.")
        pieces: list[str] = []
        for piece in self._model.generate(
            prompt, self._stops, temperature=temperature, max_tokens=min(max_tokens, free), seed=seed
        ):
            pieces.append(piece)
            yield piece
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def open_chat(
    run: RunFolder,
    reporter: Reporter,
    *,
    quantization: str | None = None,
    base: bool = False,
    system: str | None = None,
) -> TerminalChat:
    """Open a chat with a GGUF of a run.

    Args:
        run: the run folder.
        reporter: shows when the base model has to be converted first.
        quantization: which GGUF; "none" for the unquantized; default: the run's first.
        base: chat with the base model instead of the tuned one.
        system: system prompt; None: the run's.

    Raises:
        RunFolderError, ArtifactError, ConfigError: there is no such run or GGUF, or it is not what the run made.
    """
    config = saved_config(run)
    name = choose_quantization(config, quantization)
    path = base_gguf(run, config, name, reporter) if base else verified_gguf(run, name)[0]
    tokenizer, stops = trained_folder(run), modelfile.recorded_stops(run)
    return TerminalChat(GgufModel(path), tokenizer, stops, config.system if system is None else system)
