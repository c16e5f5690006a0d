"""The C++ compiler is the one that CXX names, else the system's."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune.foundation.compilers import system_compiler


def program(folder: Path, name: str) -> str:
    file = folder / name
    file.write_text("#!/bin/sh\n", encoding="utf-8")
    file.chmod(0o755)
    return str(file)


def test_which_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert system_compiler() is None
    fallback = program(tmp_path, "g++")
    assert system_compiler() == fallback
    usual = program(tmp_path, "c++")
    assert system_compiler() == usual
    monkeypatch.setenv("CXX", program(tmp_path, "clang++-20"))
    assert system_compiler() == str(tmp_path / "clang++-20")
