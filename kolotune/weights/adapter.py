"""Read LoRA adapters in PEFT's format, or in mlx-lm's.

PEFT's own functions need the model as a PyTorch module; here an adapter is applied to one stored weight at a time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.errors import ArtifactError, ModelError

from . import mlx_adapter
from .adapter_config import AdapterConfig, read_adapter_config
from .dtypes import FLOATS, as_f32
from .lora_delta import Delta, ExpertDelta
from .mapped_tensors import MappedTensors
from .weight_files import check_file

if TYPE_CHECKING:
    import numpy as np

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_orig_mod)\.")
_ADAPTER = r"(\.(?!weight$|bias$)(?P<adapter>[\w-]+))?"
_LORA = re.compile(
    rf"(?P<module>.+?)(?P<depth>(\.base_layer)*)\.lora_(?P<embedding>embedding_)?(?P<part>[AB]){_ADAPTER}"
    r"(\.(?P<leaf>weight|bias))?$"
)
_MAGNITUDE = re.compile(rf"(?P<module>.+)\.lora_magnitude_vector{_ADAPTER}(\.weight)?$")
_TOKENS = re.compile(rf"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta{_ADAPTER}$")
_SAVED = re.compile(
    r"(?P<module>.+?)(\.token_adapter)?(\.base_layer)*(\.modules_to_save(\.default)?)?\.(?P<leaf>weight|bias)$"
)
_NOT_USED = re.compile(r"\.(lora_velora_|lora_monteclora_|trainable_tokens_original|original_module\.)")
_COPY_AGAIN = "Copy the adapter again."


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that were trained whole; the others were not."""

    indices: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter.

    Attributes:
        config: its settings.
        deltas: what it adds, by the names of the weights.
        replaced: weights that were trained whole, by name, fp32.
        experts: what it adds to weights of all experts in one, by the names of these weights.
        added: what it adds to biases, by name, fp32.
        token_rows: rows of embeddings, by the embedding's name.
    """

    config: AdapterConfig
    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, np.ndarray] = field(default_factory=dict)
    experts: dict[str, ExpertDelta] = field(default_factory=dict)
    added: dict[str, np.ndarray] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)

    @property
    def changed(self) -> dict[str, None]:
        """The names of all weights that it changes."""
        return dict.fromkeys([*self.replaced, *self.deltas, *self.experts, *self.added, *self.token_rows])


def read_adapter(folder: Path) -> LoraAdapter:
    """Read the adapter in a folder.

    Raises:
        ModelError: there is none, it is pickled, or it can't be merged exactly.
        ArtifactError: a file is damaged.
    """
    mlx = mlx_adapter.read_config(folder)
    if mlx is not None:
        deltas, replaced = mlx_adapter.changes(folder, mlx, _tensors(folder, mlx_adapter.WEIGHTS))
        return LoraAdapter(AdapterConfig(mlx.rank, ties_weights=True, base_name=mlx.base_name), deltas, replaced)
    config = read_adapter_config(folder)
    return _Assembly(folder, config).assemble(_tensors(folder, _WEIGHTS))


def _tensors(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Read the tensors of a file, fp32.

    Raises:
        ModelError: there is no such file, or it has tensors that are no floating-point numbers.
        ArtifactError: it is damaged.
    """
    import numpy as np

    weights = folder / name
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        reason = "only pickled weights, which can run code and are never loaded" if pickled else f"no {name}"
        raise ModelError(f"{folder}: has {reason}", "Save the adapter as safetensors.")
    try:
        check_file(weights)
    except ModelError as error:
        raise ArtifactError(error.cause, "Train again, or copy the adapter again.") from error
    mapped = MappedTensors([weights])
    tensors = {}
    for key, entry in mapped.entries.items():
        if entry.dtype not in FLOATS:
            raise _unmergeable(folder, key)
        tensors[key] = as_f32(mapped[key], entry.dtype)
        if not np.isfinite(tensors[key]).all():
            raise ArtifactError(f"{folder}: {key} holds values that are not finite", "Train again with a lower rate.")
    return tensors


def _unmergeable(folder: Path, name: str) -> ModelError:
    return ModelError(f"{folder}: {name} can't be merged", "Only LoRA adapters can be merged.")


@dataclass
class _Pair:
    """A and B of one module, with what else belongs to them."""

    a: np.ndarray | None = None
    b: np.ndarray | None = None
    bias: np.ndarray | None = None
    is_embedding: bool = False


class _Assembly:
    """Puts the tensors of a file in PEFT's format together."""

    def __init__(self, folder: Path, config: AdapterConfig) -> None:
        self._folder = folder
        self._config = config
        self._adapter = LoraAdapter(config)
        # By module, and by how many wrappers it is inside of: PEFT nests one for each parameter of a module.
        self._pairs: dict[str, dict[int, _Pair]] = defaultdict(lambda: defaultdict(_Pair))
        self._magnitudes: dict[str, np.ndarray] = {}
        self._adapter_names: set[str] = set()

    def assemble(self, tensors: dict[str, np.ndarray]) -> LoraAdapter:
        """Return the adapter."""
        for name, tensor in tensors.items():
            self._sort(name, _WRAPPERS.sub("", name).removeprefix(_PREFIX), tensor)
        if len(self._adapter_names) > 1:
            raise ModelError(
                f"{self._folder}: holds several adapters: {', '.join(sorted(self._adapter_names))}", "Save one of them."
            )
        for module, pairs in self._pairs.items():
            self._add(module, [pairs[depth] for depth in sorted(pairs)])
        if not self._adapter.changed:
            raise ArtifactError(f"{self._folder}: the adapter is empty", "Train again.")
        return self._adapter

    def _sort(self, name: str, plain: str, tensor: np.ndarray) -> None:
        if _NOT_USED.search(plain):
            return
        if match := _LORA.fullmatch(plain):
            pair = self._pairs[match["module"]][match["depth"].count(".")]
            pair.is_embedding |= bool(match["embedding"])
            setattr(pair, "bias" if match["leaf"] == "bias" else match["part"].lower(), tensor)
        elif self._config.has_magnitudes and (match := _MAGNITUDE.fullmatch(plain)):
            self._magnitudes[match["module"]] = tensor.reshape(-1)
        elif match := _TOKENS.fullmatch(plain):
            self._adapter.token_rows[f"{match['module']}.weight"] = self._token_rows(match["module"], tensor)
        elif match := _SAVED.fullmatch(plain):
            self._adapter.replaced[f"{match['module']}.{match['leaf']}"] = tensor
            return
        else:
            raise _unmergeable(self._folder, name)
        self._adapter_names |= {match["adapter"]} - {None}

    def _token_rows(self, module: str, tensor: np.ndarray) -> TokenRows:
        import numpy as np

        indices = np.array(self._config.tokens_of(module), np.int64)
        if tensor.ndim != 2 or len(indices) != len(tensor) or len(set(indices.tolist())) != len(indices):
            raise ArtifactError(f"{self._folder}: {module}: its rows are not those of the config", _COPY_AGAIN)
        return TokenRows(indices, tensor)

    def _add(self, module: str, pairs: list[_Pair]) -> None:
        """Add the update of a module's weight, or those of several of its parameters."""
        parameters = self._config.parameters_of(module, len(pairs))
        if not parameters and len(pairs) == 1:
            self._add_weight(module, pairs[0])
            return
        if len(parameters) != len(pairs) or self._config.initial is not None:
            raise _unmergeable(self._folder, f"{module}, which has {len(pairs)} updates,")
        for name, pair in zip(parameters, pairs, strict=True):
            a, b = self._matrices(name, pair)
            rank = self._config.rank_of(name)
            experts, rest = divmod(len(a), rank)
            if rest:
                raise ArtifactError(f"{name}: its rank is {len(a)}, the config says {rank}", _COPY_AGAIN)
            if experts == 1:
                self._adapter.deltas[name] = Delta(a, b, self._config.scale(name, rank), transposed=False)
                continue
            self._adapter.experts[name] = ExpertDelta(
                a.reshape(experts, rank, -1),
                b.reshape(len(b), rank, experts).transpose(2, 0, 1),
                self._config.scale(name, rank),
            )

    def _add_weight(self, module: str, pair: _Pair) -> None:
        import numpy as np

        a, b = self._matrices(module, pair)
        if self._config.has_magnitudes and self._magnitudes.get(module, np.empty(0)).shape != b.shape[:1]:
            raise ArtifactError(f"{self._folder}: {module} lacks magnitudes, but use_dora is set", _COPY_AGAIN)
        transposed = self._config.transposed or pair.is_embedding
        scale = self._config.scale(module, len(a))
        initial = None if pair.is_embedding else self._config.initial
        self._adapter.deltas[f"{module}.weight"] = Delta(
            a, b, scale, transposed, self._magnitudes.get(module), initial=initial
        )
        if pair.bias is not None:
            self._adapter.added[f"{module}.bias"] = pair.bias * np.float32(scale)

    def _matrices(self, module: str, pair: _Pair) -> tuple[np.ndarray, np.ndarray]:
        """Return a module's A and B, checked."""
        a, b = pair.a, pair.b
        if a is None or b is None:
            raise ArtifactError(f"{self._folder}: {module} has only one of A and B", _COPY_AGAIN)
        if 0 in (*a.shape, *b.shape) or min(a.ndim, b.ndim) < 2:
            raise ArtifactError(
                f"{self._folder}: {module}: its weights are not whole; they were saved while they were sharded",
                "Save the adapter again with the shards gathered (DeepSpeed: zero_to_fp32.py; FSDP: full state dict).",
            )
        if max(a.ndim, b.ndim) > 2:
            raise _unmergeable(self._folder, f"{module}, LoRA on a convolution,")
        if a.shape[0] != b.shape[1]:
            raise ArtifactError(f"{self._folder}: {module}: the ranks of A and B differ", _COPY_AGAIN)
        return a, b
