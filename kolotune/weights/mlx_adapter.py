"""Adapters in mlx-lm's format: other names and orientations, and a scale that is final."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, ModelError
from kolotune.foundation.typed_storage import JsonObject

from .adapter_folder import FILE
from .lora_delta import Delta

if TYPE_CHECKING:
    import numpy as np

WEIGHTS = "adapters.safetensors"
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)$")
_EMBEDDINGS = (".embed_tokens", ".wte", ".tok_embeddings", ".word_embeddings")
_EXPERTS = re.compile(r"(?P<layer>.+)\.switch_(?:mlp|glu)\.(?P<leaf>[a-z_]+)$")
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_COPY_AGAIN = "Copy the adapter again."


@dataclass(frozen=True)
class MlxConfig:
    """The settings of an adapter of mlx-lm that a merge depends on.

    Attributes:
        rank: of its matrices; 1 where all weights were trained.
        scale: factor of the product, as it is.
        base_name: the base model's name; "" when the file does not say.
        is_full: whether the weights themselves were trained.
    """

    rank: int
    scale: float
    base_name: str
    is_full: bool


def read_config(folder: Path) -> MlxConfig | None:
    """Read the config of an adapter of mlx-lm; None if the folder holds none, or one in another format.

    Raises:
        ModelError: it was trained in a way that can't be merged.
        ArtifactError: the config has no rank or scale.
    """
    path = folder / FILE
    try:
        values = typed_storage.read_object(path)
    except (OSError, typed_storage.StorageError):
        return None
    settings = values.get("lora_parameters")
    if "peft_type" in values or not ("fine_tune_type" in values or isinstance(settings, dict)):
        return None
    kind = str(values.get("fine_tune_type") or "lora")
    if kind not in ("lora", "dora", "full"):
        raise ModelError(
            f"{path}: is of mlx-lm's kind {kind[:40]!r}", "Fuse it with mlx_lm.fuse, then `kolotune export`."
        )
    name = str(values.get("model") or "")
    if kind == "full":
        return MlxConfig(1, 1.0, name, is_full=True)
    rank, scale = _settings(settings)
    if not isinstance(rank, int) or rank < 1 or not _is_number(scale):
        raise ArtifactError(f"{path}: lora_parameters has no rank and scale", _COPY_AGAIN)
    return MlxConfig(rank, float(scale), name, is_full=False)


def _settings(values: object) -> tuple[object, object]:
    settings: JsonObject = values if isinstance(values, dict) else {}
    return settings.get("rank"), settings.get("scale")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def changes(
    folder: Path, config: MlxConfig, tensors: dict[str, np.ndarray]
) -> tuple[dict[str, Delta], dict[str, np.ndarray]]:
    """Return what an adapter adds, and what it replaces, by the names of the base model's weights.

    Raises:
        ModelError: it has a tensor that can't be merged.
        ArtifactError: it is not whole.
    """
    if config.is_full:
        return {}, tensors
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match is None:
            raise ModelError(f"{folder}: {name} can't be merged", "Fuse it with mlx_lm.fuse, then `kolotune export`.")
        parts.setdefault(match["module"], {})[match["part"]] = tensor
    deltas: dict[str, Delta] = {}
    for module, part in parts.items():
        a, b = part.get("lora_a"), part.get("lora_b")
        if a is None or b is None or a.ndim != b.ndim or a.ndim not in (2, 3):
            raise ArtifactError(f"{folder}: {module} lacks a matrix", _COPY_AGAIN)
        if a.ndim == 3:
            deltas |= _expert_deltas(folder, module, config, a, b)
        else:
            deltas[f"{module}.weight"] = _delta(folder, module, config, a, b, part.get("m"))
    if not deltas:
        raise ArtifactError(f"{folder}: the adapter is empty", "Train again.")
    return deltas, {}


def _delta(
    folder: Path, module: str, config: MlxConfig, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None
) -> Delta:
    """Return the update of a linear layer, of ``[in, rank]`` and ``[rank, out]``, or of an embedding.

    An embedding's is ``[vocabulary, rank]`` and ``[rank, width]``; its magnitudes are one for each token.
    """
    if a.shape[1] != b.shape[0] or a.shape[1] != config.rank:
        raise ArtifactError(f"{folder}: {module}: its rank is {a.shape[1]}, the config says {config.rank}", _COPY_AGAIN)
    down, up = (b, a) if f".{module}".endswith(_EMBEDDINGS) else (a.T, b.T)
    if magnitude is not None and magnitude.shape != up.shape[:1]:
        raise ArtifactError(f"{folder}: {module}: its magnitudes are not whole", _COPY_AGAIN)
    return Delta(down, up, config.scale, transposed=False, magnitude=magnitude)


def _expert_deltas(folder: Path, module: str, config: MlxConfig, a: np.ndarray, b: np.ndarray) -> dict[str, Delta]:
    """Return the updates of a layer's experts, which are stored one by one in the base model."""
    match = _EXPERTS.fullmatch(module)
    if match is None or len(a) != len(b) or a.shape[1] != b.shape[2]:
        raise ModelError(f"{folder}: {module} can't be merged", "Fuse it with mlx_lm.fuse, then `kolotune export`.")
    leaf = _MIXTRAL.get(match["leaf"], match["leaf"]) if "block_sparse_moe" in module else match["leaf"]
    return {
        f"{match['layer']}.experts.{expert}.{leaf}.weight": Delta(down, up, config.scale, transposed=False)
        for expert, (down, up) in enumerate(zip(a, b, strict=True))
    }
