"""The toolchain: the pinned converter, or a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune import llamacpp
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.installation import CONVERTER_VERSION


def test_the_converter_is_downloaded_with_its_templates(toolchain: llamacpp.Toolchain) -> None:
    assert toolchain.version == CONVERTER_VERSION and toolchain.quantizer is None
    assert toolchain.converter.is_file()
    assert (toolchain.root / "gguf-py").is_dir()
    assert len(list(llamacpp.templates_folder().glob("*.jinja"))) > 50


def test_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(ToolchainError, match="neither convert_hf_to_gguf"):
        llamacpp.find()
    (tmp_path / "convert_hf_to_gguf.py").write_text("", encoding="utf-8")
    own = llamacpp.find()
    assert own is not None and own.version == "own" and own.quantizer is None
    program = tmp_path / "build" / "bin" / "llama-quantize"
    program.parent.mkdir(parents=True)
    program.write_text("", encoding="utf-8")
    own = llamacpp.find()
    assert own is not None and own.quantizer == program


def test_a_server_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolchain: llamacpp.Toolchain) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    (tmp_path / "llama-server").write_text("", encoding="utf-8")
    assert llamacpp.find() == toolchain, "the rest is the pinned one"


@pytest.mark.parametrize("name", ["libllama.so", "libllama.dylib", "llama.dll"])
def test_a_release_has_no_converter(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolchain: llamacpp.Toolchain
) -> None:
    platform = {"libllama.so": "linux", "libllama.dylib": "darwin", "llama.dll": "win32"}[name]
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    (tmp_path / name).write_bytes(b"")
    assert llamacpp.find() == toolchain, "the pinned one converts"


def test_nothing_downloaded_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path))
    assert llamacpp.find() is None
    with pytest.raises(ToolchainError, match="not been downloaded"):
        llamacpp.templates_folder()
