"""Do transformers and llama.cpp compute the same? A tiny model of the architecture is asked, in a process of its own.

It has the real one's number of layers, kinds of layers, rotary embedding, factors and switches (`shrunk_config`), and
random weights, so that whatever one side leaves out moves the result. llama.cpp may end the process.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.engines.exact_model import open_exact_model, reason_unsupported
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, ToolchainError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners.child_process import emit
from kolotune.weights.safetensors_header import read_header
from kolotune.weights.shrunk_config import VOCABULARY, WINDOW
from kolotune.weights.stored_names import StoredNames
from kolotune.weights.weight_files import weight_files

if TYPE_CHECKING:
    import numpy as np

_TOKENS = 4 * WINDOW
_FIRST_TOKEN = 3  # below are those that begin, end and pad


class FailedSide(StrEnum):
    """What could not compute the tiny model, so that nothing is compared; the values are on disk."""

    TRANSFORMERS = "transformers"
    MERGE = "merge"
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
        divergence_within: mean KL in a text of as many tokens as a sliding window of the tiny model has, or as it has
            positions without dynamic scaling; None: not compared.
        divergence_median: median KL at all positions: where it is small and the mean is not, few positions differ, as
            when rounding lets a router choose another expert; None: not compared.
        packed: mean KL of the packed passes at all positions, from transformers; None: they don't compute such a model.
        obstacle: what could not compute; None: both did.
        reason: the obstacle in its own words.
    """

    divergence: float | None = None
    divergence_within: float | None = None
    divergence_median: float | None = None
    packed: float | None = None
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
            # The short text first: dynamic scaling remembers the longest.
            logits = [
                model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0] for tokens in (ids[:WINDOW], ids)
            ]
    except Exception as error:  # a hundred model classes raise whatever they like
        return ComputationProof(obstacle=FailedSide.TRANSFORMERS, reason=f"{type(error).__name__}: {error}")
    if (unstored := _unstored_layer(model, folder)) is not None:
        return ComputationProof(
            obstacle=FailedSide.MERGE, reason=f"the files of the model have no weight of {unstored}"
        )
    before_within, before = (torch.log_softmax(each.double(), dim=-1).numpy() for each in logits)
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
    whole, within = divergence.between(before, after), divergence.between(before_within, after[:WINDOW])
    median = float(np.median((np.exp(before) * (before - after)).sum(axis=-1)))
    return ComputationProof(whole.kl_mean, within.kl_mean, median, _packed_divergence(folder, ids, before))


def _packed_divergence(folder: Path, ids: list[int], before: np.ndarray) -> float | None:
    """Return how far the packed passes are from log-probabilities ``[positions, vocabulary]``; None: they can't."""
    import torch

    from . import divergence

    if reason_unsupported(folder, len(ids)):
        return None
    try:
        ((_, logits),) = open_exact_model(folder, {}).logits([ids], [range(len(ids))], False)
    except (ArtifactError, RuntimeError):
        return None
    return divergence.between(before, torch.log_softmax(logits.double(), dim=-1).numpy()).kl_mean


def _unstored_layer(model: Any, folder: Path) -> str | None:
    """Return a linear layer whose adapter could not be merged, because nothing in the files is its weight; or None."""
    import torch

    stored = {entry.name for path in weight_files(folder) for entry in read_header(path).entries}
    names = StoredNames(folder, stored)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(part.isdecimal() for part in name.split(".")):
            weight = f"{name}.weight"
            if not (names.find(weight) or names.rows(weight) or names.pieces(weight)):
                return str(name)
    return None
