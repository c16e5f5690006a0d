"""Folders of chats: which of their files are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune.chats.reading.files import require_file
from kolotune.foundation import config as configs
from kolotune.foundation.chat_paths import files_of, is_other_split
from kolotune.foundation.errors import DataError


def folder(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text("x")
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["chats.jsonl"], ["chats.jsonl"]),
        (["b.jsonl", "a.jsonl.gz", "README.md", "dataset_info.json", ".hidden.jsonl"], ["a.jsonl.gz", "b.jsonl"]),
        (["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "README.md"],
         ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        (["notes.txt", "test.md", ".hidden.md"], ["notes.txt", "test.md"]),
        (["README.md", "data/b.txt", "data/a.md"], ["data/a.md", "data/b.txt"]),
        (["README.md", "page.md", "data/a.md"], ["README.md", "page.md"]),
    ],
)  # fmt: skip
def test_files_of_a_folder(names: list[str], read: list[str], tmp_path: Path) -> None:
    path = folder(tmp_path, *names)
    assert files_of(path) == tuple(path / name for name in read)
    config = configs.resolve(({"train_data": ["set"]}, "test", tmp_path))
    assert config.train_data == files_of(path)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["train.jsonl", "test.jsonl"], "to train on: train.jsonl; kept for testing: test.jsonl"),
        (["data/train-0.parquet", "data/validation-0.parquet"], "--eval-data"),
        (["chats.jsonl", "data/train-0.parquet"], "others in its folder data (chats.jsonl, data/train-0.parquet)"),
        (["notes.docx"], "no files of chats"),
    ],
)
def test_a_folder_that_leaves_a_choice_is_an_error(names: list[str], hint: str, tmp_path: Path) -> None:
    path = folder(tmp_path, *names)
    assert files_of(path) == (path,)
    with pytest.raises(DataError) as caught:
        require_file(path)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("name", "is_other"),
    [("test.jsonl", True), ("test-0.jsonl", True), ("eval_1.json", True), ("dev.csv", True), ("val.jsonl", True),
     ("testament.jsonl", False), ("developers.jsonl", False), ("train_test.jsonl", False), ("values.csv", False)],
)  # fmt: skip
def test_names_of_files_that_are_kept_for_testing(name: str, is_other: bool) -> None:
    assert is_other_split(Path(name)) is is_other
