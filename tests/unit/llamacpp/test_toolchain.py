"""The toolchain: pinned, or a user's own."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from kolotune import llamacpp
from kolotune.foundation.errors import ToolchainError
from kolotune.llamacpp import toolchain as toolchains


def test_converter_and_library_have_the_same_version(toolchain: llamacpp.Toolchain) -> None:
    assert toolchain.version == importlib.metadata.version("llama-cpp-python") == toolchains.check_library()
    assert toolchain.converter.is_file()
    assert (toolchain.root / "gguf-py").is_dir()
    assert len(list(llamacpp.templates_folder().glob("*.jinja"))) > 50


def test_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(ToolchainError, match="convert_hf_to_gguf"):
        llamacpp.find()
    (tmp_path / "convert_hf_to_gguf.py").write_text("", encoding="utf-8")
    own = llamacpp.find()
    assert own is not None and own.version == "own" and own.quantizer is None
    program = tmp_path / "build" / "bin" / "llama-quantize"
    program.parent.mkdir(parents=True)
    program.write_text("", encoding="utf-8")
    own = llamacpp.find()
    assert own is not None and own.quantizer == program


def test_nothing_downloaded_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path))
    assert llamacpp.find() is None
    with pytest.raises(ToolchainError, match="not been downloaded"):
        llamacpp.templates_folder()
