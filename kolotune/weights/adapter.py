"""LoRA adapters in PEFT's format: read, checked, and applied to one weight at a time."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import ArtifactError, ModelError

from .tensors import FLOATS, MappedTensors, as_f32, check_header

if TYPE_CHECKING:
    import numpy as np

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.default)?(\.weight)?$")
_NESTED, _REPEATS, _LONGEST_PATTERN = re.compile(r"\)\s*[*+{?]"), re.compile(r"[*+{]"), 300
_CALM = 1 << 18  # a product of fewer multiplications is made by one thread
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

    a: np.ndarray
    b: np.ndarray
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it is added to."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)

    def rows(self, rows: slice) -> np.ndarray:
        """``scale * B A`` for some rows of the weight, fp32."""
        import numpy as np

        left, right = (self.a.T, self.b.T) if self.transposed else (self.b, self.a)
        left = left[rows]
        count, width = left.shape[0], right.shape[1]
        product = np.empty((count, width), np.float32)
        # A few rows at a time: larger products BLAS would share out to threads, of which there are enough.
        step = max(_CALM // (width * left.shape[1]), 1)
        whole = count // step * step
        np.matmul(left[:whole].reshape(-1, step, left.shape[1]), right, out=product[:whole].reshape(-1, step, width))
        np.matmul(left[whole:], right, out=product[whole:])
        product *= np.float32(self.scale)
        return product


@dataclass(frozen=True)
class Adapter:
    """An adapter: `deltas` by the name of the weight, and `replaced` weights (fp32) that were trained whole."""

    folder: Path
    config: dict[str, Any]
    deltas: dict[str, Delta]
    replaced: dict[str, np.ndarray]

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
    try:
        check_header(weights)
    except ModelError as error:
        raise ArtifactError(error.cause, "Train again, or copy the adapter again.") from error
    mapped = MappedTensors([weights])
    for name, entry in mapped.entries.items():
        if entry.dtype not in FLOATS:
            raise ModelError(f"{folder}: {name} is of no kind that can be merged", "Only LoRA adapters can be merged.")
    tensors = {name: as_f32(mapped[name], entry.dtype) for name, entry in mapped.entries.items()}
    return _sorted_out(folder, config, tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(
            f"{folder}: holds no adapter (there is no {CONFIG})", "Give a folder in PEFT's format."
        ) from None
    except (ValueError, RecursionError) as error:
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
    for option in ("rank_pattern", "alpha_pattern"):
        _check_patterns(path, option, config.get(option) or {})
    if not _is_number(config.get("lora_alpha", 1)):
        raise ArtifactError(f"{path}: lora_alpha is no number", "Copy the adapter again.")
    return config


def _check_patterns(path: Path, option: str, patterns: Any) -> None:
    """They are regular expressions that came with the adapter: short ones without repetition in repetition only."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else [("", None)]:
        heavy = len(pattern) > _LONGEST_PATTERN or _NESTED.search(pattern) or len(_REPEATS.findall(pattern)) > 3
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            heavy = True
        if heavy or not _is_number(value):
            raise ArtifactError(f"{path}: {option} is none that can be read", "Copy the adapter again.")


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold; JSON has whole ones without an end, and Python reads NaN too."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _sorted_out(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Adapter:
    import numpy as np

    parts: dict[str, dict[str, np.ndarray]] = {}
    embeddings: set[str] = set()
    replaced: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ArtifactError(f"{folder}: {name} holds values that are not finite", "Train again with a lower rate.")
        plain = name.removeprefix(_PREFIX)
        if found := _LORA.fullmatch(plain):
            parts.setdefault(found["module"], {})[found["part"]] = tensor
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
