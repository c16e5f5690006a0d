"""Data sets of the hub: their files of chats, of one revision, in the hub's own cache.

A data set is named as in ``hf://datasets/OWNER/NAME``, with ``@REVISION`` behind it and the path of a file or folder,
or a pattern of files, behind that where they are needed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kolotune.foundation.chat_paths import is_chat_file, is_other_split
from kolotune.foundation.errors import DataError
from kolotune.foundation.secrets import Secret

from .hub import check_hashes, explained_errors

PREFIX = "hf://datasets/"
# As a path it has lost a slash, and may stand behind the folder that it was made absolute from.
_REFERENCE = re.compile(
    r"(?:^|/)hf:/{1,2}datasets/(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/\w+/[^/]+|[^/]+))?(?:/(?P<path>.+))?$",
    re.ASCII,
)
_SHOWN = 6


@dataclass(frozen=True)
class DatasetReference:
    """What the user wrote.

    Attributes:
        name: Owner and name.
        revision: A commit, a branch or a tag; None for the newest.
        path: A file, a folder or a pattern in the data set; "" for its files of chats.
    """

    name: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        return PREFIX + self.name + (f"@{self.revision}" if self.revision else "") + (f"/{self.path}" * bool(self.path))


def reference_of(path: Path) -> DatasetReference | None:
    """Return the data set that a path names; None for other paths."""
    match = _REFERENCE.search(path.as_posix())
    return (
        None if match is None else DatasetReference(match["name"], match["revision"], (match["path"] or "").strip("/"))
    )


def download_dataset(reference: DatasetReference, token: Secret | None) -> tuple[Path, ...]:
    """Download the files of chats that a reference names, and return them by name; those in the cache are kept.

    Raises:
        DataError: It has no such file, or some are kept for testing, so that the user has to say which to train on.
        ModelNotFoundError, AccessError, OfflineError: The hub refused it, or can't be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download

    plain = token.reveal() if token else None
    with explained_errors(str(reference), "data set"):
        info = HfApi().dataset_info(reference.name, revision=reference.revision, token=plain)
        names = chosen_files(reference, [sibling.rfilename for sibling in info.siblings or []])
        # By commit: all files are of one revision, also if another one is pushed meanwhile.
        files = [
            Path(hf_hub_download(reference.name, name, repo_type="dataset", revision=info.sha, token=plain))
            for name in names
        ]
    check_hashes(str(reference), files)
    return tuple(files)


def chosen_files(reference: DatasetReference, files: Sequence[str]) -> list[str]:
    """Return the files that a reference names, of all files of the data set.

    Raises:
        DataError: As in `download_dataset`.
    """
    chats = sorted(file for file in files if is_chat_file(Path(file)))
    if reference.path:
        chosen = [file for file in chats if file == reference.path or fnmatch.fnmatchcase(file, reference.path)]
        chosen = chosen or [file for file in chats if str(PurePosixPath(file).parent) == reference.path]
    else:
        chosen = next((found for folder in (".", "data") if (found := _in_folder(chats, folder))), [])
    if not chosen:
        folders = sorted({str(PurePosixPath(file).parent) for file in chats})
        shown = ", ".join(folders[:_SHOWN]) + (", …" if len(folders) > _SHOWN else "")
        hint = (
            f"Name a folder of it, as in {PREFIX}{reference.name}/{folders[0]}; it has chats in: {shown}."
            if folders
            else ""
        )
        raise DataError(f"{reference}: has no files of chats there", hint or "The data set has no files of chats.")
    if reference.path in chosen or "*" in reference.path or not any(is_other_split(Path(file)) for file in chosen):
        return chosen
    kept = [file for file in chosen if not is_other_split(Path(file))] or chosen
    pattern = re.sub(r"\d{3,}.*(?=\.)", "*", kept[0])
    raise DataError(
        f"{reference}: some of its files are kept for testing",
        f"Name those to train on, as in '{PREFIX}{reference.name}/{pattern}', and others with --eval-data.",
    )


def _in_folder(files: Sequence[str], folder: str) -> list[str]:
    return [file for file in files if str(PurePosixPath(file).parent) == folder]
