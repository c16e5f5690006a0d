"""The packaged GGUF as a model folder: the files that transformers would save of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kolotune.base_models import packaged_gguf, packaged_model
from kolotune.foundation.hashing import hash_file
from kolotune.foundation.reporter import PlainReporter

_WEIGHTS = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
_TOKENIZER = "e9f1b9eb29e5f4fc508736f874cc7d1321834fb5610e169fb1acae231472321b"


def test_weights_and_tokenizer_are_known(reporter: PlainReporter) -> None:
    folder = packaged_model.unpack(reporter)
    assert hash_file(folder / "model.safetensors") == _WEIGHTS
    assert hash_file(folder / "tokenizer.json") == _TOKENIZER


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reporter: PlainReporter) -> Path:
    """The file in the package."""
    kept = tmp_path / "kept.gguf"
    run = packaged_model.child_process.run

    def keep(module: str, source: str, *more: str, **options: Any) -> int:
        kept.write_bytes(Path(source).read_bytes())
        return run(module, source, *more, **options)

    monkeypatch.setattr(packaged_model.child_process, "run", keep)
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "cache"))
    packaged_model.unpack(reporter)
    return kept


@pytest.mark.slow
def test_every_file_is_as_transformers_saves_it(gguf: Path, tmp_path: Path) -> None:
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    load: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    packaged_gguf.unpack(gguf, ours)
    widened = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = load(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=widened, trust_remote_code=False
    )
    for leftover in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    model.save_pretrained(theirs)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    pieces = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(pieces)
    tokenizer.save_pretrained(theirs)
    names = sorted(path.name for path in theirs.iterdir())
    assert names == sorted(path.name for path in ours.iterdir()) and len(names) == 6
    assert [name for name in names if (ours / name).read_bytes() != (theirs / name).read_bytes()] == []
