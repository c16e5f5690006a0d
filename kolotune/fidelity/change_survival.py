"""How much of the adapter's change is left in each matrix of a GGUF; see `adapter_change`."""

from __future__ import annotations

from pathlib import Path

from kolotune.gguf.stored_values import StoredValues

from .comparison import MatrixSurvival

_WEIGHTS_AT_ONCE = 1 << 17  # they are still in the processor's cache when they are multiplied


def change_survival(gguf: Path, changes: Path) -> list[MatrixSurvival]:
    """Return the share of the adapter's change that is left in each matrix, in the order of the file.

    Args:
        gguf: the file.
        changes: what `adapter_change.ChangeRecorder` wrote; where it is missing, nothing was recorded.

    Raises:
        ArtifactError: the GGUF is damaged.
        ToolchainError: ggml can't read a type in it.
    """
    import numpy as np
    from safetensors import safe_open

    if not changes.is_file():
        return []
    survivals = []
    some = np.empty(_WEIGHTS_AT_ONCE, np.float32)
    with safe_open(changes, framework="numpy") as file, StoredValues(gguf) as values:
        recorded = set(file.keys())
        for name, tensor in values.tensors.items():
            if f"{name}.sums" not in recorded:
                continue
            inputs, b = file.get_tensor(f"{name}.inputs"), file.get_tensor(f"{name}.b")
            base_part, energy = file.get_tensor(f"{name}.sums")
            if tensor.shape != (len(inputs), len(b)):
                continue
            part = 0.0
            for rows, block in values.blocks(name, some):
                part += float(np.sum((block @ inputs) * b[rows], dtype=np.float64))
            survivals.append(MatrixSurvival(name, tensor.type, (part - float(base_part)) / float(energy)))
    return survivals
