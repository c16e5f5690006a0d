"""Tars that go in and come out."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.files import hash_file
from kolotune.runners.container.archive import Item, packed, unpack


def tar_of(*entries: tarfile.TarInfo) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for entry in entries:
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
    return held.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname = kind, size, link
    return made


def test_what_is_packed_can_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(3_000_001))
    items = [Item("a/ü 日本.txt", b"one"), Item("a/b/large", tmp_path / "large"), Item(f"a/{'n' * 180}", b"")]
    whole = b"".join(packed(items))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        assert [each.name for each in tar] == ["a", "a/ü 日本.txt", "a/b", "a/b/large", f"a/{'n' * 180}"]
        assert {(each.uid, each.gid) for each in tar.getmembers()} == {(1000, 1000)}
    pieces = [whole[at : at + 997] for at in range(0, len(whole), 997)]
    unpack(iter(pieces), "a", tmp_path / "out")
    assert (tmp_path / "out" / "ü 日本.txt").read_bytes() == b"one"
    assert (tmp_path / "out" / "b" / "large").read_bytes() == (tmp_path / "large").read_bytes()


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"1234"), lambda path: path.write_bytes(b"12345x")])
def test_a_file_that_changes_while_it_is_sent(change: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    stream = packed([Item("file", path, hash_file(path))])
    next(stream)
    change(path)
    with pytest.raises(ArtifactError, match="changed while it was sent"):
        list(stream)


def test_a_file_whose_bytes_change_is_known_by_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    known = hash_file(path)
    path.write_bytes(b"12346")
    with pytest.raises(ArtifactError, match="changed"):
        list(packed([Item("file", path, known)]))


@pytest.mark.parametrize(
    "bad",
    [
        entry("run/../../outside", size=1),
        entry("/outside", size=1),
        entry("other/file", size=1),
        entry("run/link", tarfile.SYMTYPE, link="/etc/passwd"),
        entry("run/hard", tarfile.LNKTYPE, link="../outside"),
        entry("run/device", tarfile.CHRTYPE),
        entry("run/pipe", tarfile.FIFOTYPE),
        entry("run/a\\..\\..\\outside", size=1),
        entry("run/c:file", size=1),
        entry("..", tarfile.DIRTYPE),
    ],
    ids=lambda bad: bad.name,
)
def test_what_is_no_plain_file_of_the_run_is_refused(bad: tarfile.TarInfo, tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    with pytest.raises(ArtifactError, match="is no plain file"):
        unpack([tar_of(entry("run", tarfile.DIRTYPE), bad)], "run", room / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["room"]


def test_a_link_that_was_made_before_a_file_below_it_is_no_way_out(tmp_path: Path) -> None:
    bad = tar_of(entry("run", tarfile.DIRTYPE), entry("run/d", tarfile.SYMTYPE, link=str(tmp_path)), entry("run/d/x"))
    with pytest.raises(ArtifactError):
        unpack([bad], "run", tmp_path / "out")
    assert not (tmp_path / "x").exists()


def test_a_tar_that_is_cut_off_anywhere(tmp_path: Path) -> None:
    # Its end, two empty blocks, is padded to 10 KB.
    whole = tar_of(entry("run", tarfile.DIRTYPE), entry("run/file", size=1000), entry("run/last", size=5))
    unpack([whole], "run", tmp_path / "whole")
    end = len(whole.rstrip(b"\0")) + 512
    for cut in [*range(0, end, 100), *range(512, end, 512), end + 511]:
        with pytest.raises(ArtifactError, match=r"damaged|cut off|did not come"):
            unpack([whole[:cut]], "run", tmp_path / f"out{cut}")


def test_nothing_came(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="did not come"):
        unpack([tar_of()], "run", tmp_path / "out")
