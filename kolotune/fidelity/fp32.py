"""A model in fp32 and what it finds likely: whole where it fits into memory, else one decoder layer at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from .. import adapters
from ..errors import ArtifactError, SpaceError
from ..reporter import size_in_words
from ..weights import MappedTensors, weight_files
from .task import Asked

_BYTES = 4
_SPARE = 1.2  # beside the weights: activations, logits, the libraries


def needed(folder: Path) -> int:
    """Bytes that a model's weights take in fp32."""
    return sum(math.prod(each.shape) for each in MappedTensors(weight_files(folder)).entries.values()) * _BYTES


def fits(folder: Path) -> bool:
    """Whether a model fits into the memory that is free."""
    import psutil

    return needed(folder) * _SPARE < psutil.virtual_memory().available


class Whole:
    """A model that is in memory as a whole.

    Args:
        folder: in the hub's format.

    Raises:
        ArtifactError: the folder's weights are not all that its config asks for.
        SpaceError: there is not enough memory.
    """

    def __init__(self, folder: Path) -> None:
        if not fits(folder):
            raise SpaceError(
                f"{folder.name}: comparing computes in fp32, which takes {size_in_words(needed(folder) * _SPARE)}; "
                "less memory is free",
                "Free some memory, or leave the comparison out with --no-compare.",
            )
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            raise ArtifactError(f"{folder.name}: can't be loaded: {str(error).splitlines()[0]}") from error
        self.model: Any = loaded[0]
        missing = sorted(map(str, loaded[1]["missing_keys"]))
        if missing:
            raise ArtifactError(f"{folder.name}: its weights lack {missing[0]}, which its config asks for")
        self.model.eval()

    def add(self, folder: Path) -> None:
        """Puts an adapter onto the weights, in fp32: ``W + scale * B A``.

        Raises:
            ArtifactError, ModelError: it can't be read, or is not for this model.
        """
        adapter = adapters.read(folder)
        self._untie(adapter)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, whole in adapter.replaced.items():
                _of(parameters, name).copy_(torch.from_numpy(np.ascontiguousarray(whole)))
            for name, delta in adapter.deltas.items():
                weight = _of(parameters, name)
                delta = self._oriented(name, delta)
                if delta.shape != tuple(weight.shape):
                    raise ArtifactError(f"the adapter adds {delta.shape} to {name}, which is {tuple(weight.shape)}")
                weight.add_(torch.from_numpy(delta.rows(slice(None))))

    def _oriented(self, name: str, delta: adapters.Delta) -> adapters.Delta:
        """GPT-2 keeps its weights as [in, out]: what the module is tells it, not what the adapter's config says."""
        path = name.removesuffix(".weight")
        known = dict(self.model.named_modules())
        module = known.get(path) or known.get(f"model.{path}") or known.get(path.removeprefix("model."))
        if isinstance(module, nn.Linear):
            return dataclasses.replace(delta, transposed=False)
        if isinstance(module, transformers.pytorch_utils.Conv1D):
            return dataclasses.replace(delta, transposed=True)
        return delta

    def _untie(self, adapter: adapters.Adapter) -> None:
        """An adapter on one of two weights that are one leaves the other as it was."""
        changed = {*adapter.deltas, *adapter.replaced}
        head, words = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is None or head.weight is not words.weight or adapter.config.get("ensure_weight_tying"):
            return
        if any(name.endswith(("lm_head.weight", "embed_tokens.weight", "wte.weight")) for name in changed):
            head.weight = nn.Parameter(head.weight.detach().clone())

    @torch.no_grad()
    def log_probabilities(self, chats: Sequence[Asked]) -> Iterator[np.ndarray]:
        """For each chat, what is likely after each of its positions, fp32 ``[positions, words]``."""
        for chat in chats:
            positions = torch.tensor(chat.positions)
            logits: Tensor = self.model(input_ids=torch.tensor([chat.ids]), logits_to_keep=positions).logits[0]
            yield torch.log_softmax(logits.float(), dim=-1).numpy()

    @torch.no_grad()
    def answers(self, prompts: Sequence[Sequence[int]], end: int, longest: int) -> list[list[int]]:
        """Greedy answers to prompts, with the end token where they come to it."""
        if not prompts:
            return []
        size = max(map(len, prompts))
        ids = torch.tensor([[end] * (size - len(each)) + list(each) for each in prompts])
        seen = torch.tensor([[0] * (size - len(each)) + [1] * len(each) for each in prompts])
        # The model's own settings may sample, or punish repetition: what counts here is the likeliest token.
        settings: Any = transformers.GenerationConfig
        self.model.generation_config = settings()
        made = self.model.generate(
            input_ids=ids,
            attention_mask=seen,
            generation_config=settings(do_sample=False, max_new_tokens=longest, eos_token_id=end, pad_token_id=end),
        )
        return [_until(end, row[size:].tolist()) for row in made]


def _until(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def _of(parameters: dict[str, Any], name: str) -> Tensor:
    """The parameter of that name; some models are saved without the outer module's name."""
    for candidate in (name, name.removeprefix("model."), f"model.{name}"):
        if candidate in parameters:
            found: Tensor = parameters[candidate]
            return found
    raise ArtifactError(f"the adapter changes {name}, which the base model does not have")
