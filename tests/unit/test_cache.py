"""The cache: one folder, and only files whose hash is the pinned one."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kolotune.cache import cache_folder, fetch_package
from kolotune.errors import KolotuneError, OfflineError


def test_the_cache_is_moved_by_its_variable(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "c"))
    assert cache_folder("models") == tmp_path / "c" / "models"
    assert not (tmp_path / "c").exists()
    monkeypatch.setenv("KOLOTUNE_CACHE", "")
    assert cache_folder("models").parts[-2:] == ("kolotune", "models")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: Any) -> tuple[Path, str]:
    """A local folder as the package index, with one wheel; and the wheel's hash."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_thing/data.txt", "data")
        archive.writestr("tiny_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        archive.writestr(
            "tiny_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_thing-1.0.dist-info/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(name, value)
    return wheel, hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_the_pinned_file_is_fetched(index: tuple[Path, str], tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    found = fetch_package("tiny-thing==1.0", index[1], into)
    assert found.parent == into
    assert found.read_bytes() == index[0].read_bytes()


@pytest.mark.parametrize("requirement", ["tiny-thing==1.0", "tiny-thing==2.0"])
def test_another_hash_or_a_missing_version_is_refused_and_nothing_is_kept(
    index: tuple[Path, str], tmp_path: Path, requirement: str
) -> None:
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(KolotuneError, match="tiny-thing") as error:
        fetch_package(requirement, "0" * 64, into)
    assert isinstance(error.value, OfflineError)
    assert "Traceback" not in error.value.cause
    assert not list(into.rglob("*.whl"))


def test_the_folder_is_found_without_loading_anything_large() -> None:
    code = "import kolotune.cache, sys; sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
