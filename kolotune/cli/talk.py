"""The verbs that talk to a model: chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..config import DEFAULT_OUTPUT_DIR
from ..layout import RunFolder
from .options import reporter


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this module."""
    app.command()(chat)


def chat(
    run: Annotated[Path, typer.Argument(help="The run folder.")] = DEFAULT_OUTPUT_DIR,
    prompt: Annotated[Optional[str], typer.Option(help="Ask this, print the answer, and end.")] = None,  # noqa: UP045
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model, not the tuned one.")] = False,
    quantization: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Which GGUF: a quantization of the run, or none; default: the run's first."),
    ] = None,
    system: Annotated[Optional[str], typer.Option(help="System prompt; default: the run's.")] = None,  # noqa: UP045
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> int:
    """Talks to the result through llama.cpp, with the template and stops that it was trained with."""
    from ..chatting import open_chat

    say = reporter()
    talk = open_chat(RunFolder(run.absolute()), say, quantization=quantization, base=base, system=system)

    def answer(text: str) -> None:
        for piece in talk.ask(text, temperature=temperature, max_tokens=max_tokens, seed=seed):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")

    if prompt is not None:
        answer(prompt)
        return 0
    say.note("Type a message; an empty line or Ctrl-D ends the chat.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            return 0
        if not text.strip():
            return 0
        answer(text)
