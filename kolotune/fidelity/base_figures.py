"""What a base model does with the compared chats, kept in the cache: runs on one base and the same chats share it.

It depends on the content of the base, the tokens, and the programs that compute, and on nothing that is trained.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.files import remove
from kolotune.version import VERSION

from .tasks import ComparedChat

_PACKAGES = ("torch", "transformers")
_MOST = 64  # files of some kilobytes


@dataclass(frozen=True)
class BaseFigures:
    """The figures of a base model.

    Attributes:
        losses: of each chat, summed over its trained tokens, by their weights.
        answers: the ids of the greedy answer to each prompt.
    """

    losses: list[float]
    answers: list[list[int]]


def figures_file(
    base_sha256: str, chats: Sequence[ComparedChat], prompts: Sequence[Sequence[int]], end: int, longest: int
) -> Path:
    """Return the file for the figures of a base, which may not exist yet.

    Args:
        base_sha256: hash of the base's content.
        chats: that are compared.
        prompts: the ids of those that are answered.
        end: the token that ends an answer.
        longest: an answer's most tokens.
    """
    versions = [VERSION, *(importlib.metadata.version(name) for name in _PACKAGES)]
    compared = [[chat.ids, chat.positions, *([chat.weights] if chat.weights else [])] for chat in chats]
    subject = json.dumps([versions, base_sha256, compared, [list(ids) for ids in prompts], end, longest])
    return cache_folder("base_figures") / f"{hashlib.sha256(subject.encode()).hexdigest()[:32]}.json"


def read(file: Path) -> BaseFigures | None:
    """Return the figures in a file; None when it is missing or damaged."""
    return typed_storage.read_or_none(BaseFigures, file)


def keep(file: Path, losses: list[float], answers: Sequence[list[int] | None]) -> None:
    """Write figures to a file, unless prompts were not answered: with more memory they would be."""
    given = [answer for answer in answers if answer is not None]
    if len(given) < len(answers):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    typed_storage.write(file, BaseFigures(losses, given))
    with suppress(OSError):  # another process may remove the same
        for old in sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-_MOST]:
            remove(old)
