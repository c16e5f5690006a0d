"""``--container [NAME]`` and its companions on a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.runners.container import names

FLAG, LEAVE_INSIDE, WITH_CHECKPOINTS = "--container", "--leave-inside", "--with-checkpoints"


@dataclass(frozen=True)
class ContainerRequest:
    """A verb to run in a container.

    Attributes:
        rest: the arguments without those for the container.
        name: the container.
        leave_inside: leave results in the container.
        with_checkpoints: bring training checkpoints out with the results.
    """

    rest: list[str]
    name: str
    leave_inside: bool
    with_checkpoints: bool


def parse_request(arguments: Sequence[str], verbs: Mapping[str, frozenset[str]]) -> ContainerRequest | None:
    """Take what is for the container out of a command line; None if there is no ``--container``.

    The word after ``--container`` is its name, unless it starts with a dash, is a verb and none came before, or names
    an existing file or folder. ``--container=NAME`` is unambiguous.

    Args:
        arguments: the command line.
        verbs: for each verb its options that take a value; such a value is never for the container.
    """
    if not any(word == FLAG or word.startswith(f"{FLAG}=") for word in arguments):
        return None
    rest: list[str] = []
    name, leave_inside, with_checkpoints = "", False, False
    value_options: frozenset[str] | None = None  # of the verb, once it is known
    words = iter(enumerate(arguments))
    for index, word in words:
        following = arguments[index + 1] if index + 1 < len(arguments) else "-"
        if word == "--":
            rest += arguments[index:]
            break
        if word == FLAG:
            name = names.DEFAULT_NAME
            is_verb = value_options is None and following in verbs
            if not following.startswith("-") and not is_verb and not _exists(following):
                name = following
                next(words)
        elif word.startswith(f"{FLAG}="):
            name = word.partition("=")[2]
        elif word in (LEAVE_INSIDE, WITH_CHECKPOINTS):
            leave_inside |= word == LEAVE_INSIDE
            with_checkpoints |= word == WITH_CHECKPOINTS
        else:
            rest.append(word)
            if value_options is None:
                value_options = verbs.get(word)
            elif word in value_options and index + 1 < len(arguments):
                rest.append(following)
                next(words)
    return ContainerRequest(rest, name, leave_inside, with_checkpoints) if name else None


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False
