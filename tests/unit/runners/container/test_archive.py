"""Archives to and from containers and other machines."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.hashing import hash_file
from kolotune.runners.container.archive import ArchiveFile, pack, unpack


def tar_of(*entries: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for entry in entries:
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def test_unpack_reverses_pack(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(3_000_001))
    files = [
        ArchiveFile("a/ü 日本.txt", b"one"),
        ArchiveFile("a/b/large", tmp_path / "large"),
        ArchiveFile(f"a/{'n' * 180}", b""),
    ]
    whole = b"".join(pack(files))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        assert [info.name for info in tar] == ["a", "a/ü 日本.txt", "a/b", "a/b/large", f"a/{'n' * 180}"]
        assert {(info.uid, info.gid) for info in tar.getmembers()} == {(1000, 1000)}
    chunks = [whole[at : at + 997] for at in range(0, len(whole), 997)]
    unpack(iter(chunks), "a", tmp_path / "out")
    assert (tmp_path / "out" / "ü 日本.txt").read_bytes() == b"one"
    assert (tmp_path / "out" / "b" / "large").read_bytes() == (tmp_path / "large").read_bytes()


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"1234"), lambda path: path.write_bytes(b"12345x")])
def test_a_file_that_changes_while_it_is_packed(change: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    stream = pack([ArchiveFile("file", path, hash_file(path))])
    next(stream)
    change(path)
    with pytest.raises(ArtifactError, match="changed"):
        list(stream)


def test_a_file_that_has_changed_at_the_same_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    known = hash_file(path)
    path.write_bytes(b"12346")
    with pytest.raises(ArtifactError, match="changed"):
        list(pack([ArchiveFile("file", path, known)]))


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
def test_anything_but_a_plain_file_of_the_run_is_refused(bad: tarfile.TarInfo, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ArtifactError, match="not a plain file"):
        unpack([tar_of(entry("run", tarfile.DIRTYPE), bad)], "run", folder / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_a_link_with_a_file_below_it_does_not_lead_outside(tmp_path: Path) -> None:
    bad = tar_of(entry("run", tarfile.DIRTYPE), entry("run/d", tarfile.SYMTYPE, link=str(tmp_path)), entry("run/d/x"))
    with pytest.raises(ArtifactError):
        unpack([bad], "run", tmp_path / "out")
    assert not (tmp_path / "x").exists()


def test_a_tar_that_is_cut_off_anywhere(tmp_path: Path) -> None:
    # The end of a tar, two empty blocks, is padded to 10 KB.
    whole = tar_of(entry("run", tarfile.DIRTYPE), entry("run/file", size=1000), entry("run/last", size=5))
    unpack([whole], "run", tmp_path / "whole")
    end = len(whole.rstrip(b"\0")) + 512
    for cut in [*range(0, end, 100), *range(512, end, 512), end + 511]:
        with pytest.raises(ArtifactError, match=r"damaged|incomplete|did not arrive"):
            unpack([whole[:cut]], "run", tmp_path / f"out{cut}")


def test_an_archive_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="did not arrive"):
        unpack([tar_of()], "run", tmp_path / "out")
