"""A GGUF with another one's tokenizer, and no weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.small_tokenizer import CHATML, small_gguf

from kolotune.foundation.errors import ArtifactError
from kolotune.gguf import header
from kolotune.llamacpp.tokenizer_model import read_tokenizer_model, tokenizer_model
from kolotune.weights.gguf_metadata import MetadataReader


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    small_gguf(path)
    return path


def raw_fields(data: bytes) -> dict[str, bytes]:
    """The metadata as it is in a file."""
    return {name: data[span] for name, span in MetadataReader(data).spans.items()}


def test_the_tokenizer_is_the_other_ones(source: Path, tmp_path: Path) -> None:
    model = read_tokenizer_model(source)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.header.ljust(model.size, b"\0"))
    ours, theirs = raw_fields(model.header), raw_fields(source.read_bytes())
    kept = [name for name in theirs if name.startswith("tokenizer.") or name == "general.name"]
    assert len(kept) == 10
    assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}
    summary = header.read(copy)
    assert summary.architecture == "llama"
    assert summary.tensors["token_embd.weight"].shape == (32, 260)
    assert max(tensor.offset + tensor.size for tensor in summary.tensors.values()) + len(model.header) == model.size


def test_another_template(source: Path) -> None:
    model = tokenizer_model(source.read_bytes(), "{{ 'ä' }}")
    assert MetadataReader(model.header).fields["tokenizer.chat_template"] == "{{ 'ä' }}"
    assert MetadataReader(source.read_bytes()).fields["tokenizer.chat_template"] == CHATML


@pytest.mark.parametrize("length", [0, 3, 100, 1000])
def test_damage(source: Path, length: int) -> None:
    source.write_bytes(source.read_bytes()[:length])
    with pytest.raises(ArtifactError):
        read_tokenizer_model(source)


def test_no_tokenizer(source: Path) -> None:
    source.write_bytes(source.read_bytes().replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"))
    with pytest.raises(ArtifactError, match="has no tokenizer"):
        read_tokenizer_model(source)
