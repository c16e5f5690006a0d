"""The verb `chat`: talk to a result in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kolotune.foundation.config import DEFAULT_MAX_TOKENS, DEFAULT_OUTPUT_DIR, DEFAULT_SEED, DEFAULT_TEMPERATURE
from kolotune.foundation.errors import ConfigError, Terminated
from kolotune.foundation.reporter import Reporter, print_pieces
from kolotune.run_folder.layout import RunFolder

from .options import reporter
from .parameters import FileRole, Quantization, Run

if TYPE_CHECKING:
    from kolotune.ollama.chat import OllamaChat
    from kolotune.serving.terminal_chat import TerminalChat


def chat(
    run: Run = DEFAULT_OUTPUT_DIR,
    name: Annotated[str | None, typer.Argument(help="With --ollama: the model's name there.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer and exit.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Chat with the base model instead of the tuned one.")] = False,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="Chat with it in Ollama, under the name it was installed with.")
    ] = False,
    quantization: Quantization = None,
    system: Annotated[str | None, typer.Option(help="System prompt; default: the run's.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help=f"0: always the most likely token. [default: {DEFAULT_TEMPERATURE}; in Ollama the model's]"
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help=f"Longest answer, in tokens. [default: {DEFAULT_MAX_TOKENS}; in Ollama the model's]"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help=f"Sampling seed. [default: {DEFAULT_SEED}; in Ollama the model's]")
    ] = None,
    ratings: Annotated[
        Path | None,
        typer.Option(help="Keep what you type about answers in this file: /good, /bad, or /better and the answer."),
        FileRole.WRITTEN_HERE,
    ] = None,
) -> int:
    """Chat with the result, through llama.cpp or in Ollama."""
    say = reporter()
    with contextlib.ExitStack() as opened:
        if ollama:
            if base or quantization:
                raise ConfigError("chat: --ollama cannot be combined with --base or --quantization")
            talk: OllamaChat | TerminalChat
            talk = _in_ollama(run, name, system)
            ask = partial(talk.ask, temperature=temperature, max_tokens=max_tokens, seed=seed)
        elif name is not None:
            raise ConfigError(f"chat: {name!r} can only be a name in Ollama", "Add --ollama.")
        else:
            from kolotune.serving.terminal_chat import open_chat

            talk = open_chat(RunFolder(run.absolute()), say, quantization=quantization, base=base, system=system)
            ask = partial(
                opened.enter_context(talk).ask,
                temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
                max_tokens=max_tokens or DEFAULT_MAX_TOKENS,
                seed=DEFAULT_SEED if seed is None else seed,
            )
        if prompt is not None:
            print_pieces(ask(prompt))
        else:
            _explain(ratings, say)
            _converse(ask, partial(_rated, ratings, talk, say))
    return 0


def _explain(ratings: Path | None, say: Reporter) -> None:
    """Say what can be typed."""
    say.note("Type a message; an empty line or Ctrl-D ends the chat, Ctrl-C an answer.")
    if ratings is None:
        say.note("--ratings FILE keeps ratings of answers, and better ones, to learn from.")
        return
    say.note(
        f"/good or /bad rates an answer, /better and a text gives a better one; kept in {ratings}, for "
        "--objective kto, or dpo where all are better ones"
    )


def _rated(ratings: Path | None, talk: OllamaChat | TerminalChat, say: Reporter, text: str) -> bool:
    """Keep what a line says about the last answer; return whether it says anything."""
    from kolotune.serving.ratings import keep, line_of

    if ratings is None:
        return False
    try:
        record = line_of(text, talk.turns)
        if record is not None:
            keep(ratings, record)
    except ConfigError as error:
        say.warning(f"{error.cause}. {error.hint or ''}".strip())
        return True
    if record is not None:
        say.note(f"kept in {ratings}")
    return record is not None


def _converse(ask: Callable[[str], Generator[str]], rate: Callable[[str], bool]) -> None:
    """Answer each line that does not rate an answer, until an empty one or the end of the input."""
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        if rate(text):
            continue
        try:
            with contextlib.closing(ask(text)) as answer:
                print_pieces(answer)
        except Terminated:
            raise
        except KeyboardInterrupt:  # this answer only; it is forgotten
            print_pieces(())


def _in_ollama(run: Path, name: str | None, system: str | None) -> OllamaChat:
    from kolotune.ollama.chat import OllamaChat
    from kolotune.ollama.install import installed_name

    if name is None:  # `chat --ollama NAME`: the first argument is the name
        name = installed_name(RunFolder(run.absolute())) if run.is_dir() or run == DEFAULT_OUTPUT_DIR else str(run)
    return OllamaChat(name, system)
