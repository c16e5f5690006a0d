"""Hashes are of content, and a file is read once."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kolotune.foundation import hashing
from kolotune.foundation.hashing import Hasher, hash_file


def test_hashes_are_of_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    assert Hasher().of(path) == hashlib.sha256(b"x" * 100).hexdigest() == hash_file(path)
    assert Hasher().of(tmp_path / "nothing") == ""
    os.utime(path, (0, 0))
    assert Hasher().of(path) == hash_file(path)


def test_a_folders_hash_is_of_names_and_bytes_and_not_of_its_location(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    (one / "sub").mkdir(parents=True)
    (one / "a").write_text("a")
    (one / "sub" / "b").write_text("b")
    shutil.copytree(one, two)
    hasher = Hasher()
    first = hasher.of(one)
    assert hasher.of(two) == first
    (two / "sub" / "b").rename(two / "sub" / "c")
    assert hasher.of(two) != first
    (one / "a").write_text("b")
    assert Hasher().of(one) != first


def test_the_cache_of_hashes_is_trusted_only_while_the_file_is_untouched(tmp_path: Path) -> None:
    path, cache = tmp_path / "a", tmp_path / "hashes.json"
    path.write_bytes(b"one")
    hasher = Hasher(cache)
    first = hasher.of(path)
    hasher.save()
    assert Hasher(cache).of(path) == first
    status = path.stat()
    path.write_bytes(b"two")  # same size, and the old time is put back
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Hasher(cache).of(path) == hash_file(path) != first


def test_the_cache_saves_reading(tmp_path: Path, monkeypatch: Any) -> None:
    path, cache = tmp_path / "a", tmp_path / "hashes.json"
    path.write_bytes(b"one")
    hasher = Hasher(cache)
    digest = hasher.of(path)
    hasher.save()
    monkeypatch.setattr(hashing, "hash_file", lambda _: pytest.fail("the file was read again"))
    assert Hasher(cache).of(path) == digest


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', "null", "\udcff"])
def test_a_damaged_cache_is_ignored(tmp_path: Path, text: str) -> None:
    path, cache = tmp_path / "a", tmp_path / "hashes.json"
    path.write_bytes(b"one")
    cache.write_bytes(text.encode("utf-8", "surrogateescape"))
    hasher = Hasher(cache)
    assert hasher.of(path) == hash_file(path)
    hasher.save()


def test_a_cache_that_cannot_be_saved_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    hasher = Hasher(tmp_path / "file" / "cache.json")
    hasher.of(tmp_path / "file")
    hasher.save()


def test_files_are_hashed_while_they_are_written(tmp_path: Path, monkeypatch: Any) -> None:
    """The digest is forgotten as soon as the file changes, even if its time of modification is put back."""
    hasher, target, data = Hasher(), tmp_path / "model", [b"abc" * 1000, b"", b"\0" * 5]
    with hasher.replacing(target) as partial:
        partial.mkdir()
        for name in ("a", "b"):
            with hasher.create(partial / name) as file:
                for block in data:
                    file.write(block)
        (partial / "small").write_text("x")
    read: list[Path] = []
    monkeypatch.setattr(hashing, "hash_file", lambda path: read.append(path) or hash_file(path))
    assert hasher.of(target / "a") == hash_file(target / "a") == hashlib.sha256(b"".join(data)).hexdigest()
    assert hasher.of(target) == Hasher().of(target) and read.count(target / "a") == 1, "read by the other hasher only"
    status = (target / "b").stat()
    (target / "b").write_bytes(b"z" * status.st_size)
    os.utime(target / "b", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hasher.of(target / "b") == hash_file(target / "b")


def test_a_file_of_another_program_is_hashed_once(tmp_path: Path, monkeypatch: Any) -> None:
    hasher = Hasher()
    with hasher.replacing(tmp_path / "a") as partial:
        partial.write_bytes(b"abc")
        hasher.flush(partial)
    expected = hash_file(tmp_path / "a")
    monkeypatch.setattr(hashing, "hash_file", lambda _: pytest.fail("the file was read again"))
    assert hasher.of(tmp_path / "a") == expected


def test_the_digest_of_a_file_that_was_given_up_is_forgotten(tmp_path: Path) -> None:
    hasher = Hasher()
    with pytest.raises(ValueError, match="x"), hasher.replacing(tmp_path / "a") as partial:
        with hasher.create(partial) as file:
            file.write(b"abc")
        raise ValueError("x")
    for _ in range(20):  # inodes are used again
        with hasher.replacing(tmp_path / "a") as partial:
            partial.write_bytes(b"xyz")
        assert hasher.of(tmp_path / "a") == hash_file(tmp_path / "a")
