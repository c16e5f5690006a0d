"""llama.cpp's messages, and a registered function that outlives its callers."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from kolotune.foundation.errors import ArtifactError
from kolotune.llamacpp import library
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.llamacpp.log import messages_to


def _no_gguf(folder: Path) -> Path:
    file = folder / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    return file


def test_a_handler_gets_messages_until_its_block_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    messages: list[str] = []
    with messages_to(lambda _, text: messages.append(text)), pytest.raises(ArtifactError):
        ExactGguf(_no_gguf(tmp_path), 8)
    assert "gguf" in "".join(messages)
    assert capfd.readouterr().err == ""
    before = len(messages)
    with pytest.raises(ArtifactError):
        ExactGguf(_no_gguf(tmp_path), 8)
    assert len(messages) == before
    assert "gguf" in capfd.readouterr().err


def test_messages_after_all_handlers_are_gone(tmp_path: Path) -> None:
    """llama.cpp keeps the function's address: if the function were collected, the process would crash."""
    with pytest.raises(ArtifactError):
        ExactGguf(_no_gguf(tmp_path), 8)
    gc.collect()
    functions = library.load()
    for _ in range(3):
        path = os.fsencode(_no_gguf(tmp_path))
        assert not functions.llama_model_load_from_file(path, functions.llama_model_default_params())
