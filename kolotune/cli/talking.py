"""The verbs that talk to a model: chat, serve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer

from kolotune.foundation.config import (
    DEFAULT_HOST,
    DEFAULT_MAX_TOKENS,
    DEFAULT_OUTPUT_DIR,
    DEFAULT_PORT,
    DEFAULT_SEED,
    DEFAULT_TEMPERATURE,
)
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import print_pieces
from kolotune.run_folder.layout import RunFolder

from .options import Json, reporter


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this module."""
    for verb in (chat, serve):
        app.command()(verb)


def chat(
    run: Annotated[Path, typer.Argument(help="The run folder.")] = DEFAULT_OUTPUT_DIR,
    name: Annotated[Optional[str], typer.Argument(help="With --ollama: its name there.")] = None,  # noqa: UP045
    prompt: Annotated[Optional[str], typer.Option(help="Ask this, print the answer, and end.")] = None,  # noqa: UP045
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model, not the tuned one.")] = False,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="Talk to it in Ollama, under the name that it was installed with.")
    ] = False,
    quantization: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Which GGUF: a quantization of the run, or none; default: the run's first."),
    ] = None,
    system: Annotated[Optional[str], typer.Option(help="System prompt; default: the run's.")] = None,  # noqa: UP045
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0.0, help=f"0: always the likeliest token. [default: {DEFAULT_TEMPERATURE}; in Ollama the model's]"
        ),
    ] = None,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help=f"Longest answer, in tokens. [default: {DEFAULT_MAX_TOKENS}; in Ollama the model's]"),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help=f"Seed of the sampling. [default: {DEFAULT_SEED}; in Ollama the model's]"),
    ] = None,
) -> int:
    """Talks to the result through llama.cpp, or in Ollama, with the template and stops that it was trained with."""
    say = reporter()
    if ollama:
        if base or quantization:
            raise ConfigError("chat: --ollama goes with neither --base nor --quantization")
        ask = _in_ollama(run, name, system, temperature, max_tokens, seed)
    elif name is not None:
        raise ConfigError(f"chat: {name} is a name in Ollama, which needs --ollama")
    else:
        from kolotune.serving.terminal_chat import open_chat

        talk = open_chat(RunFolder(run.absolute()), say, quantization=quantization, base=base, system=system)
        ask = partial(
            talk.ask,
            temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
            max_tokens=max_tokens or DEFAULT_MAX_TOKENS,
            seed=DEFAULT_SEED if seed is None else seed,
        )

    if prompt is not None:
        print_pieces(ask(prompt))
    else:
        say.note("Type a message; an empty line or Ctrl-D ends the chat.")
        _converse(ask)
    return 0


def _converse(ask: Callable[[str], Iterable[str]]) -> None:
    """Answers line by line, until an empty one or the input's end."""
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        print_pieces(ask(text))


def serve(
    run: Annotated[Path, typer.Argument(help="The run folder.")] = DEFAULT_OUTPUT_DIR,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own are a risk.")
    ] = DEFAULT_HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = DEFAULT_PORT,
    quantization: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Which GGUF: a quantization of the run, or none; default: the run's first."),
    ] = None,
    json: Json = False,
) -> int:
    """Serves the result to programs that speak OpenAI's API, as it would be in Ollama."""
    from kolotune.serving.app import serve as serve_model
    from kolotune.serving.served_model import ServedModel

    serve_model(ServedModel(RunFolder(run.absolute()), quantization), host, port, reporter(json))
    return 0


def _in_ollama(
    run: Path,
    name: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
) -> Callable[[str], Iterator[str]]:
    from kolotune.ollama.install import OllamaChat, installed_name

    if name is None:  # `chat --ollama NAME`: what stands first is no run folder then
        name = installed_name(RunFolder(run.absolute())) if run.is_dir() or run == DEFAULT_OUTPUT_DIR else str(run)
    talk = OllamaChat(name, system)
    return partial(talk.ask, temperature=temperature, max_tokens=max_tokens, seed=seed)
