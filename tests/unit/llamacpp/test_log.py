"""llama.cpp's messages, and that what hears them outlives whoever asked."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from kolotune.foundation.errors import ArtifactError
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.llamacpp.log import messages_to


def _no_gguf(folder: Path) -> Path:
    file = folder / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    return file


def test_a_listener_hears_until_its_block_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    with messages_to(lambda _, text: heard.append(text)), pytest.raises(ArtifactError):
        ExactGguf(_no_gguf(tmp_path), 8)
    assert "gguf" in "".join(heard)
    assert capfd.readouterr().err == ""
    before = len(heard)
    with pytest.raises(ArtifactError):
        ExactGguf(_no_gguf(tmp_path), 8)
    assert len(heard) == before
    assert "gguf" in capfd.readouterr().err


def test_llama_cpp_speaks_after_everyone_who_listened_is_gone(tmp_path: Path) -> None:
    """It keeps the address that it was given: a collected function there ends the process."""
    import llama_cpp

    with pytest.raises(ArtifactError):
        ExactGguf(_no_gguf(tmp_path), 8)
    gc.collect()
    for _ in range(3):
        with pytest.raises(ValueError, match="Failed to load"):
            llama_cpp.Llama(str(_no_gguf(tmp_path)), verbose=False)
