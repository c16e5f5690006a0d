"""What llama.cpp computes of a sequence does not depend on the sequences before it, nor on guesses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kolotune.fidelity import divergence
from kolotune.foundation.config import Config
from kolotune.gguf.quantizer import quantize
from kolotune.llamacpp import evaluation
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.run_folder.layout import RunFolder

BEGIN = list(range(10, 40))
SEQUENCES = [[*BEGIN, 7, 8, 9], [*BEGIN, 9, 8], [*BEGIN, 9, 8, 7, 6], [3, *BEGIN], BEGIN[:5]]


@pytest.fixture
def gguf(finished: Config) -> Path:
    return RunFolder(finished.output_dir).gguf


@pytest.fixture
def model(gguf: Path) -> Iterator[ExactGguf]:
    with contextlib.closing(ExactGguf(gguf, 128)) as model:
        yield model


@pytest.mark.parametrize("batch", [8, 256])
def test_as_if_alone(model: ExactGguf, gguf: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", batch)
    computed = 0
    decode = model._decode

    def counted(batch: object) -> None:
        nonlocal computed
        computed += batch.n_tokens  # type: ignore[attr-defined]
        decode(batch)

    monkeypatch.setattr(model, "_decode", counted)
    for ids in SEQUENCES:
        with contextlib.closing(ExactGguf(gguf, 128)) as alone:
            expected = alone.log_probabilities(ids, [len(ids) - 2, len(ids) - 1])
        actual = model.log_probabilities(ids, [len(ids) - 2, len(ids) - 1])
        assert np.abs(actual - expected).max() < 1e-4
    assert computed == 33 + 2 + 2 + 31 + 5
    assert np.abs(model.log_probabilities(BEGIN, range(30))[3:5] - actual).max() < 1e-4


def test_guesses_do_not_change_an_answer(model: ExactGguf) -> None:
    tokens = [token for token, _ in zip(model._greedy_tokens(BEGIN, []), range(12), strict=False)]
    other = (tokens[5] + 1) % 200
    guesses = (tokens, tokens[:4], [*tokens[:5], other, other], [other], [*tokens, other, other])
    for guess in guesses:
        assert [token for token, _ in zip(model._greedy_tokens(BEGIN, guess), range(12), strict=False)] == tokens
    plain = model.answer(BEGIN, (), 12)
    assert all(model.answer(BEGIN, (), 12, guess) == plain for guess in guesses)
    stop = model.text(tokens[6]).decode(errors="replace")
    assert model.answer(BEGIN, (stop,), 12, tokens) == model.answer(BEGIN, (stop,), 12)


@pytest.mark.parametrize("name", ["f16", "Q8_0", "Q4_K_M"])
def test_what_reading_in_batches_adds(name: str, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a comparison could see. A llama.cpp built for AVX2 added a KL of 0.004 to Q4_K_M."""
    if name != "f16":
        gguf = quantized(gguf, tmp_path / "quantized.gguf", name)
    ids = [*BEGIN, *range(50, 140)]
    read = []
    for batch in (1, 64, 64):
        monkeypatch.setattr(evaluation, "BATCH", batch)
        with contextlib.closing(ExactGguf(gguf, 128)) as model:
            read.append(model.log_probabilities(ids, range(len(ids))))
    one_by_one, together, again = read
    assert divergence.between(one_by_one, together).kl_mean < 1e-6
    assert np.array_equal(together, again)


def quantized(source: Path, target: Path, name: str) -> Path:
    quantize(source, target, name, {})
    return target
