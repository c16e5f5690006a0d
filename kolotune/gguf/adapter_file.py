"""An adapter as a GGUF of its own, which llama.cpp adds to its base model while it computes.

The rows of its matrices are in the order that the conversion plan gives the rows of the base's. The factors of the
products are part of the matrices, so that each weight may have its own.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.files import replacing
from kolotune.weights.lora_delta import Delta
from kolotune.weights.merge import MergedModel

from .conversion_plan import ConversionPlan

if TYPE_CHECKING:
    import numpy as np


class AdapterObstacle(Enum):
    """Why llama.cpp can't add an adapter to its base model, as the end of a sentence."""

    NONE = ""
    NO_ADAPTER = "its adapter is gone, or it has none"
    WHOLE_WEIGHTS = "it has weights, biases or token embeddings that were trained whole"
    MAGNITUDES = "it scales the rows of weights (DoRA)"
    INITIAL = "it starts from a part of the base model's weights (PiSSA, OLoRA)"
    VOCABULARY = "it changes the embedding or the output head"
    EXPERTS = "it changes experts that are stored in one weight, or weights that are stored transposed"
    NO_PLAN = "the base model's GGUF has other matrices than its weights"


def obstacle(model: MergedModel, plan: ConversionPlan | None) -> AdapterObstacle:
    """Return why the adapter of a model can't be a GGUF of its own.

    Args:
        model: base and adapter.
        plan: how the base's GGUF is made; None: the converter makes it.
    """
    changes = model.changes
    # PEFT also saves an adapted embedding whole.
    if model.vocabulary_names & changes.deltas.keys():
        return AdapterObstacle.VOCABULARY
    if changes.replaced or changes.added or changes.token_rows or changes.new_biases:
        return AdapterObstacle.WHOLE_WEIGHTS
    for delta in changes.deltas.values():
        if not isinstance(delta, Delta) or delta.transposed:
            return AdapterObstacle.EXPERTS
        if delta.magnitude is not None:
            return AdapterObstacle.MAGNITUDES
        if delta.initial is not None:
            return AdapterObstacle.INITIAL
    sources = [tensor.source for tensor in plan.tensors] if plan is not None else []
    if any(sources.count(name) != 1 for name in changes.deltas):
        return AdapterObstacle.NO_PLAN
    return AdapterObstacle.NONE


def write_adapter(model: MergedModel, plan: ConversionPlan, architecture: str, target: Path) -> None:
    """Write an adapter without an `obstacle`.

    Args:
        model: base and adapter.
        plan: how the base's GGUF is made.
        architecture: llama.cpp's name of the base's.
        target: the file to write.
    """
    import gguf

    deltas = model.changes.deltas
    with replacing(target) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # llama.cpp's value for no factor
        for tensor in plan.tensors:
            delta = deltas.get(tensor.source or "")
            if isinstance(delta, Delta):
                writer.add_tensor(f"{tensor.name}.lora_a", delta.a)
                writer.add_tensor(f"{tensor.name}.lora_b", _scaled(delta, tensor.order))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _scaled(delta: Delta, order: tuple[int, ...] | None) -> np.ndarray:
    """Return B with the product's factor, its rows in the GGUF's order."""
    import numpy as np

    rows = delta.b if order is None else delta.b[np.array(order)]
    return np.ascontiguousarray(rows * np.float32(delta.scale))
