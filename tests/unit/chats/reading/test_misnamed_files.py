"""Files that are something else than their name says are reported as a whole."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from kolotune.chats.reading.files import read_chats
from kolotune.foundation.errors import DataError

LINE = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
OTHERS = {
    "web page": (b"<!DOCTYPE html>\n<html>404</html>", "c.jsonl", "web page", "again"),
    "web page as a table": (b"\xef\xbb\xbf<HTML><head>", "c.csv", "web page", "again"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "c.json", "Git LFS", "git lfs pull"),
    "table": (b"question,answer\nq,a\n", "c.jsonl", "a table", ".csv"),
    "table with semicolons": (b'"Question";"Answer"\nq;a\n', "c.json", "a table", ".csv"),
    "lines as a table": (LINE, "c.csv", "is JSON", ".jsonl"),
    "an array as a table": (b"[\n" + LINE + b"]", "c.tsv", "is JSON", ".jsonl"),
    "Parquet": (b"PAR1\x15\x04", "c.jsonl", "Parquet", ".parquet"),
    "spreadsheet": (b"PK\x03\x04\x14\0", "c.csv", "spreadsheet", ".xlsx"),
    "packed": (gzip.compress(LINE), "c.jsonl", "gzip", ".gz"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_contents(name: str, tmp_path: Path) -> None:
    content, file, cause, hint = OTHERS[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_chats([tmp_path / file])
    assert cause in caught.value.cause and file in caught.value.cause and hint in caught.value.hint


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("c.jsonl", LINE),
        ("c.json", b"\n " + LINE),
        ("c.csv", b"question,answer\nq,{a}\n"),
        ("c.csv", b'"[x, y]",question,answer\n1,q,a\n'),
        ("c.json", b"[" + LINE + b"]"),
    ],
)
def test_what_is_as_its_name_says(file: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    result = read_chats([tmp_path / file])
    assert len(result.chats) == 1 and not result.problems
