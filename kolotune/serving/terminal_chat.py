"""Chat with a run's result, or with its base model in the same way, through llama.cpp's server."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from kolotune.chats.templates.plain_text import is_plain_text
from kolotune.chats.tokens.tokenizer import template_of
from kolotune.chats.tokens.trained_template import trained_folder
from kolotune.foundation import typed_storage
from kolotune.foundation.closing import Closing
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.llamacpp.model_server import ModelServer, ServerSettings
from kolotune.ollama.modelfile import ModelDescription
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import choose_quantization, saved_config, verified_gguf
from kolotune.stages import modelfile

from .base_gguf import base_gguf
from .requests import CHAT, Defaults

_THOUGHT = ("<think>\n", "\n</think>\n\n")  # however the model's template writes it


@dataclass(frozen=True)
class _AnswerPiece:
    content: str | None = None
    reasoning_content: str | None = None


@dataclass(frozen=True)
class _Choice:
    delta: _AnswerPiece


@dataclass(frozen=True)
class _Event:
    choices: list[_Choice] = field(default_factory=list)


class TerminalChat(Closing):
    """A conversation that remembers its turns. A context manager.

    Args:
        server: the model that answers; it is closed with the conversation.
        defaults: its system prompt and stops.
    """

    def __init__(self, server: ModelServer, defaults: Defaults) -> None:
        self.server, self._defaults = server, defaults
        self._messages: list[JsonObject] = []

    def close(self) -> None:
        """End the model's server."""
        self.server.close()

    def forget(self) -> None:
        """Begin another conversation."""
        self._messages = []

    @property
    def turns(self) -> list[JsonObject]:
        """The turns so far, behind the system prompt if there is one."""
        text = self._defaults.description.system
        system: list[JsonObject] = [{"role": "system", "content": text}] if text else []
        return [*system, *self._messages]

    def ask(self, text: str, *, temperature: float, max_tokens: int, seed: int) -> Generator[str]:
        """Yield the answer to `text` in pieces, a thought in tags before it; one that is interrupted is forgotten.

        Raises:
            ConfigError: the conversation exceeds the model's context.
            ToolchainError: llama.cpp has crashed.
        """
        question: JsonObject = {"role": "user", "content": text}
        messages = [*self._messages, question]
        values = {"messages": messages, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        request, _ = self._defaults.apply(CHAT, values)
        content, thought = "", ""
        for delta in self._pieces(request):
            if delta.reasoning_content:
                yield delta.reasoning_content if thought else _THOUGHT[0] + delta.reasoning_content
                thought += delta.reasoning_content
            if delta.content:
                yield _THOUGHT[1] + delta.content if thought and not content else delta.content
                content += delta.content
        answer: JsonObject = {"role": "assistant", "content": content}
        self._messages = [*messages, {**answer, "reasoning_content": thought} if thought else answer]

    def _pieces(self, request: JsonObject) -> Iterator[_AnswerPiece]:
        with contextlib.closing(self.server.events(CHAT, request)) as events:
            for event in events:
                yield from (choice.delta for choice in typed_storage.convert(_Event, event).choices)


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
        base: chat with the base model instead of the tuned one, with the trained template.
        system: system prompt; None: the run's.

    Raises:
        RunFolderError, ArtifactError, ConfigError: there is no such run or GGUF, or it is not what the run made.
    """
    config = saved_config(run)
    name = choose_quantization(config, quantization)
    path = base_gguf(run, config, name, reporter) if base else verified_gguf(run, name)[0]
    template, stops = template_of(trained_folder(run)), modelfile.recorded_stops(run)
    if is_plain_text(template.jinja):
        reporter.note("the model has no chat template: it continues what you type")
    description = ModelDescription(
        path.name,
        system=config.system if system is None else system,
        parameters=tuple(("stop", stop) for stop in stops),
    )
    server = ModelServer(path, ServerSettings(template=template.jinja if base else ""))
    return TerminalChat(server, Defaults(description, server.end_texts, template.switches))
