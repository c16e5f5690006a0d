"""LoRA: low-rank adapters beside frozen linear layers, in PEFT's names and file format.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn

from kolotune.foundation.errors import ConfigError
from kolotune.weights.composite_models import language_module
from kolotune.weights.initial_matrices import Initial

from .dora import adapted_lengths, row_squares
from .saved_modules import BIAS, WEIGHT, SavedModule
from .starting_matrices import start
from .token_rows import ROWS, NewTokenRows

if TYPE_CHECKING:
    from .lora_settings import LoraSettings

ALL_LINEAR = "all-linear"
A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
"""The trained tensors of an adapter, as attributes and in PEFT's files."""


class Adapter(Protocol):
    """The two trained matrices of one layer, or of one weight of all experts (`expert_lora.LoraExpertWeight`)."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter


Trained: TypeAlias = "Adapter | NewTokenRows | SavedModule"
"""What a training changes: adapters, rows of new tokens, and modules that are trained whole."""


def parts_of(adapter: Trained) -> tuple[str, ...]:
    """Return the names of an adapter's trained tensors: its matrices, and the magnitudes if it has some (DoRA)."""
    if isinstance(adapter, (NewTokenRows, SavedModule)):
        return adapter.parts
    return (A, B) if getattr(adapter, MAGNITUDE, None) is None else (A, B, MAGNITUDE)


class LoraPair:
    """The two trained matrices beside one linear layer.

    They are fp32 whatever the layer's dtype: an adapter's updates are smaller than bf16's steps.

    Attributes:
        lora_A: ``[rank, in]``, initially random.
        lora_B: ``[out, rank]``, initially zero.
        lora_magnitude_vector: ``[out]``, zero until the weights are known; None without magnitudes (DoRA).
        scale: factor of their product.
        dropout: probability with which inputs of A are zeroed in training.
    """

    def __init__(
        self, inputs: int, outputs: int, rank: int, scale: float, dropout: float, has_magnitudes: bool = False
    ) -> None:
        self.lora_A, self.lora_B = _new_matrices(inputs, outputs, rank, torch.device("cpu"))
        self.lora_magnitude_vector = nn.Parameter(torch.zeros(outputs)) if has_magnitudes else None
        self.scale = scale
        self.dropout = dropout

    def to(self, device: torch.device) -> None:
        """Move its tensors to a device. They are created on the CPU, from the same random numbers everywhere."""
        for part in parts_of(self):
            setattr(self, part, nn.Parameter(getattr(self, part).detach().to(device)))


def _new_matrices(inputs: int, outputs: int, rank: int, device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    a = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32, device=device))
    b = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32, device=device))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, b


class LoraLinear(nn.Module):
    """A frozen linear layer plus ``scale * B(A(dropout(x)))``; with magnitudes (DoRA), scaled to these.

    Args:
        base: the layer, ``[in] → [out]``, an `nn.Linear` or GPT-2's `Conv1D`; its weights stay frozen in their dtype.
        rank: rows of A and columns of B.
        scale: factor of the product.
        dropout: probability with which inputs of A are zeroed in training.
        has_magnitudes: see `dora`; the weights must be floating-point numbers that are all in memory.
        initial: see `starting_matrices`; the same.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        dropout: float,
        has_magnitudes: bool = False,
        initial: Initial | None = None,
    ) -> None:
        super().__init__()
        self.base: Any = base
        self._is_transposed = _is_conv1d(base)
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        weight = cast(Tensor, base.weight)
        device = torch.device("cpu") if weight.is_meta else weight.device
        self.lora_A, self.lora_B = _new_matrices(*_sizes(base), rank, device)
        if initial is not None:
            left = start(self, initial, self._rows_of_outputs)
            weight.data.copy_(left.T if self._is_transposed else left)
        self.lora_magnitude_vector: nn.Parameter | None = None
        if has_magnitudes:
            self._squares = row_squares(self._rows_of_outputs)
            self.lora_magnitude_vector = nn.Parameter(self._lengths())

    @property
    def _rows_of_outputs(self) -> Tensor:
        """The frozen weight, ``[out, in]``."""
        weight: Tensor = self.base.weight
        return weight.detach().T if self._is_transposed else weight.detach()

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """Return the lengths of the rows of the adapted weight, fp32 ``[out]``."""
        down, weight = self.scale * self.lora_A, self._rows_of_outputs
        return adapted_lengths(self._squares, down.to(weight.dtype) @ weight.T, down, self.lora_B)

    def _change(self) -> Tensor:
        """Return the factors of the outputs, less 1, fp32 ``[out]``."""
        assert self.lora_magnitude_vector is not None
        return self.lora_magnitude_vector / self._lengths() - 1

    @torch.no_grad()
    def reset(self) -> None:
        """Give the magnitudes, if there are some, the values with which they change nothing."""
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self._lengths())

    @property
    def weight(self) -> Tensor:
        """The adapted weight, as the layer keeps it, for code that reads it instead of calling the layer (Mamba's).

        Weights of 4 bits are returned as they are.
        """
        weight: Tensor = self.base.weight
        if not weight.is_floating_point():
            return weight
        delta = self.lora_B @ self.lora_A
        adapted = torch.add(weight, (delta.T if self._is_transposed else delta).to(weight.dtype), alpha=self.scale)
        if self.lora_magnitude_vector is None:
            return adapted
        change = self._change().to(weight.dtype)
        return torch.addcmul(adapted, adapted, change if self._is_transposed else change[:, None])

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        bias: Tensor | None = self.base.bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] → [..., out]`` in x's dtype."""
        low = nn.functional.linear(self.dropout(x), self.lora_A.to(x.dtype))
        delta = nn.functional.linear(low, self.lora_B.to(x.dtype))
        out: Tensor = self.base(x)
        if self.lora_magnitude_vector is None:
            return torch.add(out, delta, alpha=self.scale)
        bias = self.bias
        adapted = torch.add(out if bias is None else out - bias, delta, alpha=self.scale)
        scaled = torch.addcmul(adapted, adapted, self._change().to(x.dtype))
        return scaled if bias is None else scaled + bias


def add_adapters(model: nn.Module, settings: LoraSettings, targets: Sequence[str]) -> dict[str, LoraLinear]:
    """Freeze the model and put an adapter beside each targeted linear layer.

    Args:
        model: a causal language model of transformers.
        settings: of the adapters.
        targets: last parts of layer names, or ``all-linear`` for all layers but the head.

    Returns:
        The adapters by the layer's full name, in the model's order.

    Raises:
        ConfigError: a target is not a linear layer of the model, or it has none.
    """
    model.requires_grad_(False)
    find_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    prefix, language = language_module(model) if hasattr(model, "get_decoder") else ("", model)
    linear = {
        ".".join(filter(None, (prefix, name))): layer
        for name, layer in language.named_modules()
        if (isinstance(layer, nn.Linear) or _is_conv1d(layer)) and layer is not head and not _is_more(layer)
    }
    leaves = target_leaves({name.rpartition(".")[2] for name in linear}, targets)
    adapters = {}
    for name, layer in linear.items():
        parent_name, _, leaf = name.rpartition(".")
        if leaf in leaves:
            sizes = settings.rank_of(name), settings.scale_of(name)
            adapters[name] = LoraLinear(layer, *sizes, settings.dropout, settings.has_magnitudes, settings.initial)
            setattr(model.get_submodule(parent_name), leaf, adapters[name])
    if not adapters:
        raise ConfigError(
            "base-model: it has no linear layer that could get an adapter", "Choose a different --base-model."
        )
    return adapters


def _sizes(layer: Any) -> tuple[int, int]:
    """Return the inputs and outputs of a linear layer."""
    if _is_conv1d(layer):
        inputs, outputs = layer.weight.shape
        return inputs, outputs
    return layer.in_features, layer.out_features


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, which keeps its weight ``[in, out]``."""
    return (type(layer).__module__, type(layer).__name__) == ("transformers.pytorch_utils", "Conv1D")


def _is_more(layer: Any) -> bool:
    """Whether it is a class of a model's own that returns more than the product, such as a router."""
    if not type(layer).__module__.startswith("transformers.models."):
        return False
    try:
        result = layer(layer.weight.new_zeros(1, layer.in_features))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return True
    return not isinstance(result, Tensor) or result.shape != (1, layer.out_features)


def target_leaves(leaves: set[str], targets: Sequence[str]) -> set[str]:
    """Return the linear layers that get an adapter, by the last parts of their names.

    Raises:
        ConfigError: a target is not one of `leaves`.
    """
    if list(targets) == [ALL_LINEAR]:
        return leaves
    unknown = sorted(set(targets) - leaves)
    if unknown:
        raise ConfigError(
            f"target-modules: this model has no linear layer {', '.join(unknown)}",
            f"Its linear layers are: {', '.join(sorted(leaves))}.",
        )
    return set(targets)


class FlatAdapters:
    """All adapters' tensors in one flat tensor, so that clipping and the optimizer's step are one operation each.

    The adapters' own parameters become views of it, and their gradients views of its gradient.

    Args:
        adapters: by name.
        order: names and parts, ``("…q_proj", "lora_A")``, in the order of the flat tensor.

    Attributes:
        parameter: fp32 ``[weights]``; its gradient is allocated at once.
    """

    def __init__(self, adapters: Mapping[str, Trained], order: Sequence[tuple[str, str]]) -> None:
        matrices = {f"{name}.{part}": getattr(adapters[name], part) for name, part in order}
        flat = torch.cat([each.detach().flatten() for each in matrices.values()])
        self.parameter = nn.Parameter(flat)
        self.parameter.grad = torch.zeros_like(flat)
        self._offsets: dict[str, tuple[int, torch.Size]] = {}
        start = 0
        for name, matrix in matrices.items():
            self._offsets[name] = (start, matrix.shape)
            start += matrix.numel()
        for name, view in self.named(flat).items():
            matrices[name].data = view
        for name, view in self.named(self.parameter.grad).items():
            matrices[name].grad = view

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of a tensor laid out like `parameter`, one for each matrix, in the matrix's shape."""
        return {name: flat[start : start + shape.numel()].view(shape) for name, (start, shape) in self._offsets.items()}


def adapter_tensors(adapters: Mapping[str, Trained]) -> dict[str, Tensor]:
    """Return the adapters' weights under PEFT's names and in its form, fp32, on the CPU.

    Of a linear layer these are A ``[rank, in]`` and B ``[out, rank]``; of a weight of all experts, A ``[experts * rank,
    in]``, expert by expert, and B ``[out, rank * experts]``, with the experts side by side for each rank.
    """
    tensors = {}
    for name, adapter in adapters.items():
        for part in parts_of(adapter):
            weight: Tensor = getattr(adapter, part)
            stored = weight.detach()
            if weight.ndim == 3:
                stored = stored.flatten(0, 1) if part == A else stored.permute(1, 2, 0).flatten(1, 2)
            tensors[_stored_name(name, part)] = stored.to("cpu", copy=True).contiguous()
    return tensors


def _stored_name(adapter: str, part: str) -> str:
    """Return the name of an adapter's tensor in PEFT's files."""
    return f"base_model.model.{adapter}.{part}{'' if part in (MAGNITUDE, ROWS, WEIGHT, BIAS) else '.weight'}"


def load_tensors(adapters: Mapping[str, Trained], tensors: dict[str, Tensor]) -> None:
    """Load weights that `adapter_tensors` returned."""
    with torch.no_grad():
        for name, adapter in adapters.items():
            for part in parts_of(adapter):
                weight: Tensor = getattr(adapter, part)
                stored = tensors[_stored_name(name, part)]
                if weight.ndim == 3 and part == B:
                    stored = stored.view(*weight.shape[1:], len(weight)).permute(2, 0, 1)
                weight.copy_(stored.view(weight.shape) if part == A else stored)
