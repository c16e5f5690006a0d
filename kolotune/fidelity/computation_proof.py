"""Do transformers and llama.cpp compute the same? A tiny model of the architecture is asked, in a process of its own.

It has the real one's number of layers, kinds of layers, rotary embedding, factors and switches (`shrunk_config`), and
random weights, so that whatever one side leaves out moves the result. llama.cpp may end the process.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, ToolchainError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners.child_process import emit
from kolotune.weights.shrunk_config import VOCABULARY, WINDOW

_TOKENS = 4 * WINDOW
_FIRST_TOKEN = 3  # below are those that begin, end and pad


class FailedSide(StrEnum):
    """What could not compute the tiny model, so that nothing is compared; the values are on disk."""

    TRANSFORMERS = "transformers"
    CONVERTER = "converter"
    LLAMACPP = "llama.cpp"


@dataclass(frozen=True)
class ComputationTask:
    """Compare on a tiny model with the settings `config`.

    Attributes:
        config: shrunk.
        toolchain: folder of llama.cpp's converter.
        answer_file: receives the `ComputationProof`.
    """

    config: JsonObject
    toolchain: str
    answer_file: str


@dataclass(frozen=True)
class ComputationProof:
    """How far apart transformers and llama.cpp are.

    Attributes:
        divergence: mean KL at all positions; None: not compared.
        divergence_within: mean KL at the positions that a sliding window of the tiny model reaches back to the first
            token from; None: not compared.
        obstacle: what could not compute; None: both did.
        reason: the obstacle in its own words.
    """

    divergence: float | None = None
    divergence_within: float | None = None
    obstacle: FailedSide | None = None
    reason: str = ""


def measure(file: Path) -> None:
    """Carry out the `ComputationTask` in a file."""
    task = typed_storage.read(ComputationTask, file)
    with tempfile.TemporaryDirectory() as folder:
        proof = _prove(task, Path(folder) / "tiny")
    typed_storage.write(Path(task.answer_file), proof)


def _prove(task: ComputationTask, folder: Path) -> ComputationProof:
    import numpy as np
    import torch

    from kolotune.gguf import load_proof
    from kolotune.gguf.tiny_conversion import convert_without_tokenizer
    from kolotune.llamacpp.evaluation import ExactGguf

    from . import divergence
    from .tiny_model import write_tiny_model

    gguf = folder / "tiny.gguf"
    ids = np.random.default_rng(0).integers(_FIRST_TOKEN, VOCABULARY, _TOKENS).tolist()
    try:
        model = write_tiny_model(task.config, folder)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    except Exception as error:  # a hundred model classes raise whatever they like
        return ComputationProof(obstacle=FailedSide.TRANSFORMERS, reason=f"{type(error).__name__}: {error}")
    before = torch.log_softmax(logits.double(), dim=-1).numpy()
    try:
        convert_without_tokenizer(Path(task.toolchain), folder, gguf)
    except ToolchainError as error:
        return ComputationProof(obstacle=FailedSide.CONVERTER, reason=error.cause)
    emit("loading")
    try:
        load_proof.load(gguf)  # says why it can't
        read = ExactGguf(gguf, _TOKENS)
    except (ArtifactError, ToolchainError) as error:
        return ComputationProof(obstacle=FailedSide.LLAMACPP, reason=error.cause)
    try:
        after = read.log_probabilities(ids, range(_TOKENS))
    except ArtifactError as error:
        return ComputationProof(obstacle=FailedSide.LLAMACPP, reason=error.cause)
    finally:
        read.close()
    return ComputationProof(
        divergence.between(before, after).kl_mean, divergence.between(before[:WINDOW], after[:WINDOW]).kl_mean
    )
