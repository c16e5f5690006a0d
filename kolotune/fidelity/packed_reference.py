"""A model in fp32 by the passes that train it, where these are proven to compute what transformers computes.

`computation_gate` has compared the two on a small model of the same settings; llama.cpp, which shares no code with
them, computes the compared chats too. Other models, and adapters that are more than two matrices beside linear layers,
are computed by transformers (`reference_model`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.engines.exact_model import ExactModel, Watch, open_exact_model, reason_unsupported
from kolotune.foundation.free_memory import return_free_memory
from kolotune.weights.adapter import LoraAdapter, read_adapter
from kolotune.weights.lora_delta import Delta
from kolotune.weights.mapped_tensors import MappedTensors
from kolotune.weights.model_config import read_model_config
from kolotune.weights.weight_files import weight_files

from .tasks import ComparedChat

if TYPE_CHECKING:
    import numpy as np

_FILE_SETTINGS = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")


class PackedReference:
    """A base with its adapter, later another model of the same settings.

    Args:
        folder: of the base.
        deltas: the adapter's, by the names of weights; `add` turns them on.

    Raises:
        ArtifactError: a weight is missing or damaged, or the adapter changes what the base does not have.
    """

    def __init__(self, folder: Path, deltas: Mapping[str, Delta]) -> None:
        self._folder, self._adapted = folder, False
        self._model: ExactModel | None = open_exact_model(folder, deltas)

    @property
    def model(self) -> ExactModel:
        """What computes."""
        assert self._model is not None
        return self._model

    def close(self) -> None:
        """Free the memory."""
        self._model = None
        return_free_memory()

    def add(self, folder: Path) -> None:
        """Turn on the adapter, which is that in the folder."""
        del folder
        self._adapted = True

    def read(self, folder: Path) -> bool:
        """See `reference_model.WholeModel.read`."""
        if not have_equal_settings(self._folder, folder) or _shapes(self._folder) != _shapes(folder):
            return False
        self.close()
        self._model, self._adapted = open_exact_model(folder, {}), False
        return True

    def log_probabilities(self, chats: Sequence[ComparedChat]) -> Iterator[tuple[int, np.ndarray]]:
        """See `reference_model.WholeModel.log_probabilities`."""
        import torch

        for number, logits in self.model.logits(*_sequences(chats), self._adapted):
            logits -= torch.logsumexp(logits, 1, keepdim=True)
            yield number, logits.numpy()

    def losses(self, chats: Sequence[ComparedChat]) -> list[float]:
        """Return the loss of each chat, summed over its trained tokens, by their weights."""
        import torch

        losses = self.model.losses(*_sequences(chats), self._adapted)
        weights = [1.0 if chat.weights is None else torch.tensor(chat.weights) for chat in chats]
        return [float((each.double() * weight).sum()) for each, weight in zip(losses, weights, strict=True)]

    def answers(self, prompts: Sequence[Sequence[int]], end: int, longest: int) -> list[list[int] | None]:
        """See `reference_model.WholeModel.answers`."""
        return list(self.model.answers(prompts, [self._adapted] * len(prompts), end, longest))

    def answers_of_both(
        self, prompts: Sequence[Sequence[int]], end: int, longest: int
    ) -> tuple[list[list[int] | None], list[list[int] | None]]:
        """Return the greedy answers of the base and of the tuned model, which grow together."""
        count = len(prompts)
        answers = self.model.answers([*prompts, *prompts], [False] * count + [True] * count, end, longest)
        return list(answers[:count]), list(answers[count:])

    def watch(self, watches: Mapping[str, Watch]) -> None:
        """See `ExactModel.watch`."""
        self.model.watch(watches)


def open_packed_reference(folder: Path, adapter: str, longest: int) -> PackedReference | None:
    """Open a base with its adapter; None where transformers has to compute them.

    Args:
        folder: of the base.
        adapter: its folder; "" for none.
        longest: tokens of the longest sequence.

    Raises:
        ArtifactError, ModelError: a file is missing or damaged, or the adapter is for a different model.
    """
    if reason_unsupported(folder, longest):
        return None
    deltas: Mapping[str, Delta] = {}
    if adapter:
        read = read_adapter(Path(adapter))
        if not _is_plain(read):
            return None
        deltas = read.deltas
        linear = {name for name, shape in _shapes(folder).items() if ".layers." in name and len(shape) == 2}
        if set(deltas) - linear:
            return None
    return PackedReference(folder, deltas)


def have_equal_settings(one: Path, other: Path) -> bool:
    """Whether two folders have the same settings of a model, whatever dtype its weights are stored in."""
    values = [dict(read_model_config(folder).values) for folder in (one, other)]
    for each in values:
        for name in _FILE_SETTINGS:
            each.pop(name, None)
    return values[0] == values[1] and "quantization_config" not in values[0]


def _is_plain(adapter: LoraAdapter) -> bool:
    """Whether an adapter is nothing but two matrices beside each linear layer."""
    others = (adapter.replaced, adapter.experts, adapter.added, adapter.token_rows)
    return not any(others) and all(
        delta.magnitude is None and delta.initial is None and not delta.transposed for delta in adapter.deltas.values()
    )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry.shape) for name, entry in MappedTensors(weight_files(folder)).entries.items()}


def _sequences(chats: Sequence[ComparedChat]) -> tuple[list[list[int]], list[list[int]]]:
    return [chat.ids for chat in chats], [chat.positions for chat in chats]
