"""Files: the old one or the new one, whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from kolotune.foundation import files
from kolotune.foundation.errors import ArtifactError, SpaceError


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_file_and_a_folder_replace_older_ones(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "thing"
    files.write_text(target, "one")
    files.write_text(target, "two\n")
    assert target.read_bytes() == b"two\n"
    with files.replacing(target) as partial:  # a folder where a file was
        partial.mkdir()
        (partial / "a").write_text("a")
    with files.replacing(target) as partial:  # a folder where a folder was
        partial.mkdir()
        (partial / "b").write_text("b")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert leftovers(target.parent) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_in_the_block_leaves_the_old_one_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "thing"
    target.mkdir()
    (target / "old").write_text("good")
    with pytest.raises(type(error)), files.replacing(target) as partial:
        partial.mkdir()
        (partial / "new").write_text("half")
        raise error
    assert (target / "old").read_text() == "good"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_leftovers_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    (tmp_path / ".thing.partial").mkdir()
    (tmp_path / ".thing.partial" / "half").write_text("half")
    (tmp_path / ".thing.old").mkdir()
    with files.replacing(tmp_path / "thing") as partial:
        assert not partial.exists()
        partial.mkdir()
    with files.replacing(tmp_path / "thing") as partial:
        partial.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_the_new_one_is_flushed_before_the_rename_and_its_folder_after(tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        calls.append(f"rename {self.name} {target.name}")
        return replace(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    files.write_text(tmp_path / "a", "text")
    assert calls == ["fsync .a.partial", "rename .a.partial a", f"fsync {tmp_path.name}"]


def test_system_errors_become_errors_for_the_user(tmp_path: Path) -> None:
    full = files.explained(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "x")
    assert isinstance(full, SpaceError)
    assert full.exit_code == 13
    assert str(tmp_path / "x") in full.cause
    other = files.explained(PermissionError(errno.EACCES, "Permission denied"), tmp_path)
    assert isinstance(other, ArtifactError)
    assert "Permission denied" in other.cause
    assert other.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="can't be read or written"):
        files.write_text(tmp_path / "file" / "below", "x")
    assert (tmp_path / "file").read_text() == ""


def test_a_full_disk_is_a_space_error_and_leaves_no_partial_file(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    target.write_text("old")
    with pytest.raises(SpaceError), files.replacing(target) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_text_keeps_its_newlines(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "one\r\ntwo\n")
    assert (tmp_path / "a").read_bytes() == b"one\r\ntwo\n"


def test_remove_deletes_a_link_and_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    files.remove(tmp_path / "link")
    files.remove(tmp_path / "nothing")
    assert (tmp_path / "kept" / "file").is_file()
    assert not (tmp_path / "link").is_symlink()


def test_sizes_and_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in (("b/2", "22"), ("a", "1"), (".hidden", "333")):
        (tmp_path / name).write_text(text)
    assert files.size_of(tmp_path) == 6
    assert [path.relative_to(tmp_path).as_posix() for path in files.files_of(tmp_path)] == [".hidden", "a", "b/2"]


def test_space_is_looked_for_where_the_folder_will_be(tmp_path: Path) -> None:
    assert files.free_space(tmp_path / "not" / "yet") == pytest.approx(files.free_space(tmp_path), rel=0.1)
    files.require_space(tmp_path / "new", 1)
    with pytest.raises(SpaceError, match=r"needed there, but only .* are free") as caught:
        files.require_space(tmp_path / "new", 2**60)
    assert "on another disk" in caught.value.hint
