"""LoRA adapters in PEFT's format: read, checked, and applied to one weight at a time."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArtifactError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.default)?(\.weight)?$")
_SAVED = re.compile(r"(?P<module>.+?)\.(modules_to_save(\.default)?\.)?(?P<leaf>weight|bias)$")


@dataclass(frozen=True)
class Delta:
    """What one module's adapter adds.

    Attributes:
        a: ``[rank, in]`` (for embeddings ``[rank, vocabulary]``), fp32.
        b: ``[out, rank]``, fp32.
        scale: the product is multiplied by it.
        transposed: the weight it is added to is stored ``[in, out]``.
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight + scale * B A`` in fp32, in the weight's own orientation.

        Raises:
            ArtifactError: the shapes don't fit.
        """
        product = self.b @ self.a
        if self.transposed:
            product = product.T
        if product.shape != weight.shape:
            raise ArtifactError(
                f"the adapter does not belong to this base model: it adds {tuple(product.shape)} "
                f"to a weight of {tuple(weight.shape)}",
                "Give the base model that the adapter was trained on (--base).",
            )
        # Into the product, never into the weight: that may be the model's own memory, or be needed again.
        return product.mul_(self.scale).add_(weight)


@dataclass(frozen=True)
class Adapter:
    """An adapter: `deltas` by the name of the weight, and `replaced` weights that were trained whole."""

    folder: Path
    config: dict[str, Any]
    deltas: dict[str, Delta]
    replaced: dict[str, Tensor]

    @property
    def base_name(self) -> str:
        """What the adapter says that its base is; "" when it doesn't."""
        return str(self.config.get("base_model_name_or_path") or "")


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter."""
    return (folder / CONFIG).is_file()


def read(folder: Path) -> Adapter:
    """The adapter in a folder in PEFT's format.

    Raises:
        ModelError: it is none, it is pickled, or of a kind that can't be merged exactly.
        ArtifactError: a file is damaged.
    """
    config = _read_config(folder)
    weights = folder / _WEIGHTS
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        reason = "only pickled weights, which can run code and are never loaded" if pickled else f"no {_WEIGHTS}"
        raise ModelError(f"{folder}: has {reason}", "Save the adapter as safetensors.")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{weights}: is damaged: {error}", "Train again, or copy the adapter again.") from error
    return _sorted_out(folder, config, tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(
            f"{folder}: holds no adapter (there is no {CONFIG})", "Give a folder in PEFT's format."
        ) from None
    except ValueError as error:
        raise ArtifactError(f"{path}: is no JSON: {error}", "Copy the adapter again.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: is no LoRA adapter", "Only LoRA adapters can be merged.")
    for option in ("use_dora", "use_bdlora", "alora_invocation_tokens", "megatron_config"):
        if config.get(option):
            raise ModelError(
                f"{path}: {option} is not supported", "Merge it with the tool that made it, then `kolotune export`."
            )
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ArtifactError(f"{path}: r is no rank", "Copy the adapter again.")
    return config


def _sorted_out(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    parts: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    replaced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ArtifactError(f"{folder}: {name} holds values that are not finite", "Train again with a lower rate.")
        plain = name.removeprefix(_PREFIX)
        if found := _LORA.fullmatch(plain):
            parts.setdefault(found["module"], {})[found["part"]] = tensor.float()
            if found["embedding"]:
                embeddings.add(found["module"])
        elif found := _SAVED.fullmatch(plain):
            replaced[f"{found['module'].removesuffix('.base_layer')}.{found['leaf']}"] = tensor
        else:
            raise ModelError(f"{folder}: {name} is of no kind that can be merged", "Only LoRA adapters can be merged.")
    deltas = {}
    for module, found_parts in parts.items():
        if set(found_parts) != {"A", "B"}:
            raise ArtifactError(f"{folder}: {module} has one half of an adapter only", "Copy the adapter again.")
        a, b = found_parts["A"], found_parts["B"]
        if a.shape[0] != b.shape[1]:
            raise ArtifactError(f"{folder}: {module}: the ranks of A and B differ", "Copy the adapter again.")
        transposed = bool(config.get("fan_in_fan_out")) or module in embeddings
        deltas[f"{module}.weight"] = Delta(a, b, _scale(config, module, a.shape[0]), transposed)
    if not deltas and not replaced:
        raise ArtifactError(f"{folder}: the adapter is empty", "Train again.")
    return Adapter(folder, config, deltas, replaced)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised adapters (Kalajdzievski, 2023)."""
    alpha = float(_by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", rank)))
    wanted = int(_by_pattern(config.get("rank_pattern") or {}, module, config["r"]))
    if wanted != rank:
        raise ArtifactError(f"{module}: its rank is {rank}, the config says {wanted}", "Copy the adapter again.")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of the module's name, at a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
