"""What the adapter changes in each matrix, weighed by the inputs of the compared chats: recorded while they are read.

With inputs X and a change D = B A, how much of D is left in other weights W is the projection of ``X (W - base)ᵀ``
onto ``X Dᵀ``. It takes no more than ``Xᵀ X Aᵀ``, as narrow as the adapter's rank, so nothing as large as a matrix is
kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kolotune.weights.adapter import LoraAdapter
from kolotune.weights.lora_delta import Delta

from .adapter_place import GgufPlace

if TYPE_CHECKING:
    from .reference_model import LayeredModel, WholeModel


class _Watched:
    """A linear module that the adapter changes.

    Attributes:
        module: the module.
        inputs: ``Xᵀ X Aᵀ``, fp32 ``[in, rank]``.
        energy: squared norm of ``X Dᵀ``.
        base_part: scalar product of ``X baseᵀ`` and ``X Dᵀ``.
    """

    def __init__(self, module: nn.Linear, delta: Delta) -> None:
        self.module = module
        self.a = torch.tensor(delta.a, dtype=torch.float32)
        self.b = torch.tensor(delta.b, dtype=torch.float32) * delta.scale
        self.inputs = torch.zeros(self.a.shape[1], len(self.a))
        self.energy = self.base_part = 0.0

    @torch.no_grad()
    def add(self, inputs: Tensor, outputs: Tensor, repeats: int) -> None:
        """Add inputs ``[inputs, in]`` of the tuned module, and its outputs, as often as they occur."""
        narrow = inputs @ self.a.T
        change = narrow @ self.b.T
        if self.module.bias is not None:
            outputs = outputs - self.module.bias
        energy = float(change.double().square().sum())
        self.inputs += repeats * (inputs.T @ narrow)
        self.energy += repeats * energy
        self.base_part += repeats * (float((outputs.double() * change.double()).sum()) - energy)


class ChangeRecorder:
    """Records the inputs of the modules that an adapter changes, once the model has the adapter.

    Changes that are no plain product of two matrices (DoRA, updates of all experts in one, weights that were trained
    whole) and embeddings, which have no inputs, are not recorded.
    """

    def __init__(self, model: WholeModel | LayeredModel, adapter: LoraAdapter) -> None:
        self._model = model
        modules = dict(model.model.named_modules())
        self._watched: dict[str, _Watched] = {}
        for name, delta in adapter.deltas.items():
            path = name.removesuffix(".weight")
            spellings = (path, f"model.{path}", path.removeprefix("model."))
            module = next((modules[each] for each in spellings if each in modules), None)
            if isinstance(module, nn.Linear) and delta.magnitude is None and delta.initial is None:
                self._watched[name] = _Watched(module, delta)

    def _hook(self, watched: _Watched) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            kept = self._model.real_inputs(inputs[0])
            width = inputs[0].shape[-1]
            kept_outputs = outputs[kept].reshape(-1, outputs.shape[-1])
            watched.add(inputs[0][kept].reshape(-1, width), kept_outputs, self._model.repeats)

        return add

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the model reads in the block."""
        hooks = [each.module.register_forward_hook(self._hook(each)) for each in self._watched.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

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
