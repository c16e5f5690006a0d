"""Read LoRA adapters in PEFT's format.

PEFT's own functions need the model as a PyTorch module; here an adapter is applied to one stored weight at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.errors import ArtifactError, ModelError

from .adapter_config import AdapterConfig, read_adapter_config
from .dtypes import FLOATS, as_f32
from .lora_delta import Delta
from .mapped_tensors import MappedTensors
from .weight_files import check_file

if TYPE_CHECKING:
    import numpy as np

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.default)?(\.weight)?$")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?$")
_SAVED = re.compile(r"(?P<module>.+?)\.(modules_to_save(\.default)?\.)?(?P<leaf>weight|bias)$")


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter.

    Attributes:
        config: its settings.
        deltas: what it adds, by the names of the weights.
        replaced: weights that were trained whole, by name, fp32.
    """

    config: AdapterConfig
    deltas: dict[str, Delta]
    replaced: dict[str, np.ndarray]


def read_adapter(folder: Path) -> LoraAdapter:
    """Read the adapter in a folder.

    Raises:
        ModelError: there is none, it is pickled, or it can't be merged exactly.
        ArtifactError: a file is damaged.
    """
    config = read_adapter_config(folder)
    weights = folder / _WEIGHTS
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        reason = "only pickled weights, which can run code and are never loaded" if pickled else f"no {_WEIGHTS}"
        raise ModelError(f"{folder}: has {reason}", "Save the adapter as safetensors.")
    try:
        check_file(weights)
    except ModelError as error:
        raise ArtifactError(error.cause, "Train again, or copy the adapter again.") from error
    mapped = MappedTensors([weights])
    tensors = {}
    for name, entry in mapped.entries.items():
        if entry.dtype not in FLOATS:
            raise _unmergeable(folder, name)
        tensors[name] = as_f32(mapped[name], entry.dtype)
    return _assemble(folder, config, tensors)


def _unmergeable(folder: Path, name: str) -> ModelError:
    return ModelError(f"{folder}: {name} can't be merged", "Only LoRA adapters can be merged.")


def _assemble(folder: Path, config: AdapterConfig, tensors: dict[str, np.ndarray]) -> LoraAdapter:
    import numpy as np

    magnitudes: dict[str, np.ndarray] = {}
    pairs: dict[str, dict[str, np.ndarray]] = {}
    embeddings: set[str] = set()
    replaced: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ArtifactError(f"{folder}: {name} holds values that are not finite", "Train again with a lower rate.")
        plain = name.removeprefix(_PREFIX)
        if match := _LORA.fullmatch(plain):
            pairs.setdefault(match["module"], {})[match["part"]] = tensor
            if match["embedding"]:
                embeddings.add(match["module"])
        elif config.has_magnitudes and (match := _MAGNITUDE.fullmatch(plain)):
            magnitudes[match["module"]] = tensor.reshape(-1)
        elif match := _SAVED.fullmatch(plain):
            replaced[f"{match['module'].removesuffix('.base_layer')}.{match['leaf']}"] = tensor
        else:
            raise _unmergeable(folder, name)
    deltas = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ArtifactError(f"{folder}: {module} has only one of A and B", "Copy the adapter again.")
        a, b = pair["A"], pair["B"]
        if a.shape[0] != b.shape[1]:
            raise ArtifactError(f"{folder}: {module}: the ranks of A and B differ", "Copy the adapter again.")
        if config.has_magnitudes and magnitudes.get(module, np.empty(0)).shape != b.shape[:1]:
            raise ArtifactError(f"{folder}: {module} lacks magnitudes, but use_dora is set", "Copy the adapter again.")
        transposed = config.transposed or module in embeddings
        scale = config.scale(module, a.shape[0])
        deltas[f"{module}.weight"] = Delta(a, b, scale, transposed, magnitudes.get(module))
    if not deltas and not replaced:
        raise ArtifactError(f"{folder}: the adapter is empty", "Train again.")
    return LoraAdapter(config, deltas, replaced)
