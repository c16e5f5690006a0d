"""Compiling happens once, for this processor; where it is impossible, the error says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune.engines.native.kernels import build
from kolotune.foundation.errors import ToolchainError


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def test_without_a_compiler_it_is_not_chosen(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    assert build.reason_unavailable() == "there is no C++ compiler" and not build.can_compile()
    with pytest.raises(ToolchainError, match="no C\\+\\+ compiler"):
        build.ensure()


@pytest.mark.skipif(bool(build.reason_unavailable()), reason=f"can't be compiled: {build.reason_unavailable()}")
def test_it_is_compiled_once(empty_cache: Path) -> None:
    library = build.ensure()
    assert sorted(empty_cache.iterdir()) == [library]
    made = library.stat().st_mtime_ns
    assert build.ensure() == library and library.stat().st_mtime_ns == made


@pytest.mark.skipif(bool(build.reason_unavailable()), reason=f"can't be compiled: {build.reason_unavailable()}")
def test_a_compiler_that_fails_leaves_nothing_but_its_answer(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no room for objects\nexit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert not build.can_compile()
    with pytest.raises(ToolchainError, match="no room for objects"):
        build.ensure()
    assert [each.suffix for each in empty_cache.iterdir()] == [".log"]
