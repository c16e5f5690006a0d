"""Paths of chat files: the formats that are read, and the files in a folder of chats."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

CHAT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".xls", ".ods")
TEXT_SUFFIXES = (".txt", ".md")
"""Files that are a document each, for the objective `text`."""
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Packed files of one of these formats are read too: chats.jsonl.gz."""
_HUB_CACHE = re.compile(r"/datasets--(.+?)--([^/]+)/snapshots/([0-9a-f]{40})/(.+)$")
_NO_CHATS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json"})
_OTHER_SPLIT = re.compile(r"(test|eval|evaluation|valid|validation|val|dev)([^a-z].*)?$")


def is_chat_file(path: Path) -> bool:
    """Whether a file has the name of a file of chats."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in PACKED_SUFFIXES and len(suffixes) > 1:
        suffix = suffixes[0]
    return suffix in CHAT_SUFFIXES and path.name.lower() not in _NO_CHATS and not path.name.startswith(".")


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files of chats in a folder, or in its folder ``data``, by name; where it has none, plain texts.

    Returns:
        The path itself if it is no folder, has no such files, has chats that are kept for testing, or chats in both
        folders: which of them to train on is for the user to say.
    """
    inner = path / "data"
    chats, inner_chats = chat_files_in(path), chat_files_in(inner)
    if chats and inner_chats:
        return (path,)
    if chats := chats or inner_chats:
        return (path,) if any(map(is_other_split, chats)) else chats
    texts, inner_texts = text_files_in(path), text_files_in(inner)
    if inner_texts and all(file.stem.lower() == "readme" for file in texts):  # it describes the data set
        texts = inner_texts
    return texts or (path,)


def hub_source(path: Path) -> str | None:
    """Return the name of a file in the hub's cache of data sets, with its revision; None for other files."""
    match = _HUB_CACHE.search(path.as_posix())
    return None if match is None else f"hf://datasets/{match[1]}/{match[2]}@{match[3]}/{match[4]}"


def chat_files_in(folder: Path) -> tuple[Path, ...]:
    """Return the files of chats in a folder, by name; none if it can't be read."""
    return _files_in(folder, is_chat_file)


def text_files_in(folder: Path) -> tuple[Path, ...]:
    """Return the plain texts in a folder, by name; none if it can't be read."""
    return _files_in(folder, lambda path: path.suffix.lower() in TEXT_SUFFIXES and not path.name.startswith("."))


def _files_in(folder: Path, belongs: Callable[[Path], bool]) -> tuple[Path, ...]:
    try:
        return tuple(sorted(file for file in folder.iterdir() if belongs(file) and file.is_file()))
    except (OSError, ValueError):
        return ()


def is_other_split(file: Path) -> bool:
    """Whether the name of a file says that it is kept for testing."""
    return _OTHER_SPLIT.match(file.name.lower().split(".")[0]) is not None
