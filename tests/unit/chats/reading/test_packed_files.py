"""Chat files that are packed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from kolotune.chats.reading.files import read_chats
from kolotune.foundation.errors import DataError


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", None)]
)
def test_packed_files(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes] | None, cut: bool) -> None:
    turns = [[{"role": "user", "content": f"q{at}"}, {"role": "assistant", "content": f"a{at}"}] for at in range(500)]
    data = "\n".join(json.dumps({"messages": each}) for each in turns).encode()
    packed = pack(data) if pack else pytest.importorskip("pyarrow").compress(data, "zstd", asbytes=True)
    path = tmp_path / f"chats.jsonl.{suffix}"
    path.write_bytes(packed[: len(packed) // 2] if cut else packed)
    if cut:
        with pytest.raises(DataError, match="can't be unpacked"):
            read_chats([path])
        return
    result = read_chats([path])
    assert [chat.line for chat in result.chats] == list(range(1, 501))
    assert result.chats[0].source == path and result.shapes == {str(path): "JSONL, messages"}


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("chats.jsonl.gz", b"x", "can't be unpacked"),
        ("chats.jsonl.zst", b"x", "can't be unpacked"),
        ("chats.txt.gz", gzip.compress(b"x", mtime=0), "unknown file format .txt"),
        ("chats.jsonl.xz", lzma.compress(b""), "is empty"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=reason) as caught:
        read_chats([tmp_path / name])
    assert name in caught.value.cause and caught.value.hint
