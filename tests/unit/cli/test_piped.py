"""Chats from standard input."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from kolotune.cli.options import resolve_flags
from kolotune.cli.piped import is_pipe, saved_pipe
from kolotune.foundation.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "cache"))


def pipe(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))


@pytest.mark.parametrize(
    ("data", "suffix"),
    [
        (b"{}\n", ".jsonl"),
        (b"PAR1...", ".parquet"),
        (gzip.compress(b"{}", mtime=0), ".jsonl.gz"),
        (bz2.compress(b"{}"), ".jsonl.bz2"),
        (lzma.compress(b"{}"), ".jsonl.xz"),
        (b"PK\x03\x04", ".xlsx"),
        (b"question,answer\nq,a\n", ".csv"),
        (b'\xef\xbb\xbf"Frage";"Antwort"\nq;a\n', ".csv"),
        (b"question\tanswer\nq\ta\n", ".csv"),
        (b'\n{"question": "q", "answer": "a"}\n', ".jsonl"),
        (b'"question": "q", {}\n', ".jsonl"),
    ],
)
def test_the_same_content_is_the_same_file(data: bytes, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(data, monkeypatch)
    first = resolve_flags({}, [Path("-")]).train_data
    assert first[0].read_bytes() == data and first[0].name.endswith(suffix)
    pipe(data, monkeypatch)
    assert resolve_flags({"train_data": ["-"]}).train_data == first
    assert len(list(first[0].parent.iterdir())) == 1


def test_nothing_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(b"", monkeypatch)
    with pytest.raises(DataError, match="no chats came"):
        saved_pipe("-")
    assert not list((tmp_path / "cache" / "piped").iterdir())


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="no names for open files here")
def test_a_substituted_process() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"{}")
    os.close(writing)
    try:
        assert is_pipe(f"/dev/fd/{reading}") and not is_pipe("chats.jsonl")
        assert saved_pipe(f"/dev/fd/{reading}").read_bytes() == b"{}"
    finally:
        os.close(reading)
