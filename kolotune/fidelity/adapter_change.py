"""What the adapter changes in each matrix, weighed by the inputs of the compared chats: recorded while they are read.

With inputs X and a change D = B A, how much of D is left in other weights W is the projection of ``X (W - base)ᵀ``
onto ``X Dᵀ``. It takes no more than ``Xᵀ X Aᵀ``, as narrow as the adapter's rank, so nothing as large as a matrix is
kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kolotune.weights.adapter import LoraAdapter
from kolotune.weights.lora_delta import Delta

from .adapter_place import GgufPlace

if TYPE_CHECKING:
    from .measured_model import MeasuredModel


class _Watched:
    """A linear module that the adapter changes.

    Attributes:
        inputs: ``Xᵀ X Aᵀ``, fp32 ``[in, rank]``.
        energy: squared norm of ``X Dᵀ``.
        base_part: scalar product of ``X baseᵀ`` and ``X Dᵀ``.
    """

    def __init__(self, delta: Delta) -> None:
        self.a = torch.tensor(delta.a, dtype=torch.float32)
        self.b = torch.tensor(delta.b, dtype=torch.float32) * delta.scale
        self._gram = self.b.double().T @ self.b.double()
        self.inputs = torch.zeros(self.a.shape[1], len(self.a))
        self.energy = self.base_part = 0.0

    @torch.no_grad()
    def add(self, inputs: Tensor, outputs: Tensor, repeats: Tensor | int) -> None:
        """Add inputs ``[inputs, in]`` of the tuned module, and its outputs without a bias; see `Watch`.

        The change itself, as wide as the outputs, is not computed: its products are those of ``X Aᵀ``.
        """
        narrow = inputs @ self.a.T
        weighted = narrow * repeats
        energy = float((narrow.double().T @ weighted.double() * self._gram).sum())
        self.inputs += inputs.T @ weighted
        self.energy += energy
        self.base_part += float((weighted.double() * (outputs @ self.b)).sum()) - energy


class ChangeRecorder:
    """Records the inputs of the modules that an adapter changes, once the model has the adapter.

    Changes that are no plain product of two matrices (DoRA, updates of all experts in one, weights that were trained
    whole) and embeddings, which have no inputs, are not recorded.
    """

    def __init__(self, model: MeasuredModel, adapter: LoraAdapter) -> None:
        self._model = model
        self._watched = {
            name: _Watched(delta)
            for name, delta in adapter.deltas.items()
            if delta.magnitude is None and delta.initial is None
        }

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the model reads in the block."""
        self._model.watch({name.removesuffix(".weight"): each.add for name, each in self._watched.items()})
        try:
            yield
        finally:
            self._model.watch({})

    def write(self, path: Path, places: Mapping[str, GgufPlace]) -> None:
        """Write what `change_survival` needs, by the names and in the order of the GGUF.

        Args:
            path: a safetensors file.
            places: by the names of the adapter's parameters; those that are missing are left out.
        """
        from safetensors.numpy import save_file

        tensors = {}
        for name, watched in self._watched.items():
            place = places.get(name)
            if place is None or not watched.energy:
                continue
            b = watched.b.numpy()
            tensors[f"{place.tensor}.inputs"] = watched.inputs.numpy()
            tensors[f"{place.tensor}.b"] = np.ascontiguousarray(b if place.order is None else b[list(place.order)])
            tensors[f"{place.tensor}.sums"] = np.array([watched.base_part, watched.energy])
        save_file(tensors, path)
