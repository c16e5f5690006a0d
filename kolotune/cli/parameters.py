"""Parameters that several verbs have, and what a parameter that names a file means."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import typer


class FileRole(Enum):
    """What a parameter names, beside its type: ``Annotated[Path, typer.Option(), FileRole.INPUT]``.

    A verb that runs in a container gets its files there by this.
    """

    CHATS = "files of chats"
    INPUT = "a file or folder that is read"
    BASE_MODEL = "the name of a base model, or its folder"
    RUN_FOLDER = "a run folder"
    NEW_FOLDER = "a folder to make"
    CONFIG_FILE = "a YAML file of options"
    NOT_SENT = "a file that is read on this machine"
    WRITTEN_HERE = "a file of this machine that is written while the verb runs"


ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with options; flags override it."), FileRole.CONFIG_FILE
]
Json = Annotated[bool, typer.Option("--json", help="Print every message as a line of JSON.")]
Data = Annotated[
    list[Path] | None,
    typer.Argument(help="Files of chats: JSONL, JSON, CSV or Parquet.", show_default=False),
    FileRole.CHATS,
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="Which GGUF: one of the run's quantizations, or the word none for the unquantized one; default: the first."
    ),
]
Run = Annotated[Path, typer.Argument(help="The run folder."), FileRole.RUN_FOLDER]


def roles_of(verb: Callable[..., object]) -> dict[str, FileRole]:
    """Return the roles of a verb's parameters, by name; those without a role are left out."""
    hints = get_type_hints(verb, include_extras=True)
    return {name: each for name, hint in hints.items() for each in get_args(hint) if isinstance(each, FileRole)}
