"""The metadata of a GGUF is read without the gguf package."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune.foundation.errors import ArtifactError
from kolotune.gguf import header
from kolotune.weights.gguf_metadata import read_metadata


def test_the_same_as_the_whole_header(finished_gguf: tuple[Path, str]) -> None:
    fields = read_metadata(finished_gguf[0])
    assert fields == header.read(finished_gguf[0]).fields
    assert fields["general.architecture"] == "llama" and "im_start" in str(fields["tokenizer.chat_template"])


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(60), b"no GGUF at all"])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not a whole GGUF"):
        read_metadata(path)
