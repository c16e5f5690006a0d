"""The elementwise parts of a decoder's step, compiled: the functions of `kernels.cpp` over tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import packing
from ..attention import Attention, Heads, LongAttention, padded_places
from ..operations import Norm
from ..packing import Packed
from ..products import InputGradient, PlainProduct, Product
from ..rotary import Rotary
from .packed import packed_or_plain

_DEEPEST = 1024  # as in kernels.cpp
_POINTER, _COUNT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "norm_forward": [_POINTER] * 6 + [_COUNT] * 3 + [_REAL],
    "norm_backward": [_POINTER] * 6 + [_COUNT],
    "swiglu_forward": [_POINTER] * 2 + [_COUNT] * 3,
    "swiglu_backward": [_POINTER] * 3 + [_COUNT],
    "attention_inputs": [_POINTER] * 7,
    "attention_inputs_backward": [_POINTER] * 7,
    "softmax_forward": [_POINTER] * 2,
    "softmax_backward": [_POINTER] * 3,
    "attention_outputs": [_POINTER] * 3 + [_COUNT],
    "attention_outputs_backward": [_POINTER] * 3,
    "cross_entropy": [_POINTER] * 3 + [_COUNT] * 2 + [_REAL],
    "place": [_POINTER] * 4 + [_COUNT] * 2,
}


class _Grid(ctypes.Structure):
    """`Grid` of kernels.cpp."""

    _fields_ = (
        ("source", _POINTER), ("lengths", _POINTER), ("rows", _COUNT), ("width", _COUNT), ("prefix", _COUNT),
        ("queries", _COUNT), ("keys", _COUNT), ("depth", _COUNT),
    )  # fmt: skip


class _Split(ctypes.Structure):
    """`Split` of kernels.cpp, over an `InputGradient`."""

    _fields_ = (
        ("whole", _POINTER), ("down", _POINTER), ("width", _COUNT), ("rank", _COUNT), ("stride", _COUNT),
    )  # fmt: skip

    @classmethod
    def of(cls, gradient: InputGradient) -> _Split:
        whole, down = gradient.whole, gradient.down
        place = None if down is None else down.data_ptr()
        return cls(whole.data_ptr(), place, gradient.width, 0 if down is None else len(down), whole.stride(0))


class CompiledOperations:
    """See `operations.Operations`.

    Args:
        library: what `build.ensure` made.
        dtype: bf16 or fp32, of all tensors that have no dtype of their own.

    Raises:
        OSError: the library can't be loaded.
    """

    def __init__(self, library: Path, dtype: torch.dtype) -> None:
        loaded = ctypes.CDLL(str(library))
        self._packs = dtype == torch.bfloat16
        suffix = "bf16" if self._packs else "fp32"
        self.functions: dict[str, Callable[..., None]] = {}
        for name, arguments in _ARGUMENTS.items():
            function: Any = getattr(loaded, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
            self.functions[name] = function

    def product(self, weight: Tensor, changing: int) -> Product:
        """See `Operations`."""
        return packed_or_plain(weight, changing, self.functions["place"]) if self._packs else PlainProduct(weight)

    def attention(self, packed: Packed, heads: Heads, rotary: Rotary) -> Attention:
        """See `Operations`."""
        if max(packed.lengths) > packing.LONG or heads.width > _DEEPEST:
            return LongAttention(packed.lengths, heads, rotary)
        return CompiledAttention(self.functions, packed, heads, rotary)

    def norm(self, norm: Norm, x: Tensor, added: Tensor | None, into: Tensor) -> tuple[Tensor, Tensor]:
        """See `Operations`."""
        rows, width = x.shape
        factor = torch.empty(rows, 1, dtype=torch.float32)
        self.functions["norm_forward"](
            x.data_ptr(), None if added is None else added.data_ptr(), x.data_ptr(), norm.weight.data_ptr(),
            into.data_ptr(), factor.data_ptr(), rows, width, into.stride(0), norm.epsilon,
        )  # fmt: skip
        return x, factor

    def norm_backward(
        self, norm: Norm, d_out: InputGradient, x: Tensor, factor: Tensor, added: Tensor | None
    ) -> Tensor:
        """See `Operations`."""
        gradient = torch.empty_like(x)
        self.functions["norm_backward"](
            ctypes.byref(_Split.of(d_out)), x.data_ptr(), norm.weight.data_ptr(), factor.data_ptr(),
            None if added is None else added.data_ptr(), gradient.data_ptr(), len(x),
        )  # fmt: skip
        return gradient

    def gate(self, gate_up: Tensor, into: Tensor) -> None:
        """See `Operations`."""
        self.functions["swiglu_forward"](gate_up.data_ptr(), into.data_ptr(), *into.shape, into.stride(0))

    def gate_backward(self, d_out: InputGradient, gate_up: Tensor) -> Tensor:
        """See `Operations`."""
        gradient = torch.empty_like(gate_up)
        self.functions["swiglu_backward"](
            ctypes.byref(_Split.of(d_out)), gate_up.data_ptr(), gradient.data_ptr(), len(gate_up)
        )
        return gradient

    def cross_entropy(self, logits: Tensor, targets: Tensor, factor: float) -> tuple[float, Tensor]:
        """See `Operations`."""
        losses = torch.empty(len(logits), dtype=torch.float32)
        self.functions["cross_entropy"](logits.data_ptr(), targets.data_ptr(), losses.data_ptr(), *logits.shape, factor)
        return float(losses.sum()), logits


class CompiledAttention:
    """Short chats as a padded batch, as `attention.ShortAttention` has them; see `Attention`."""

    def __init__(self, functions: dict[str, Callable[..., None]], packed: Packed, heads: Heads, rotary: Rotary) -> None:
        self._functions, self._heads, self._rotary = functions, heads, rotary
        self._lengths, self._source, width = padded_places(packed)
        rows = len(self._lengths)
        self._grid = _Grid(
            self._source.data_ptr(), self._lengths.data_ptr(), rows, width, packed.prefix,
            heads.queries, heads.keys, heads.width,
        )  # fmt: skip
        self._at = ctypes.addressof(self._grid)
        batch = rows * heads.keys
        self._query_shape = (batch, heads.queries // heads.keys * width, heads.width)
        self._key_shape = (batch, packed.prefix + width, heads.width)

    def forward(self, qkv: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        """See `Attention`."""
        queries, keys, values = (
            qkv.new_empty(shape) for shape in (self._query_shape, self._key_shape, self._key_shape)
        )
        self._functions["attention_inputs"](
            self._at, qkv.data_ptr(), self._rotary.cosine.data_ptr(), self._rotary.sine.data_ptr(),
            queries.data_ptr(), keys.data_ptr(), values.data_ptr(),
        )  # fmt: skip
        shares = torch.bmm(queries, keys.transpose(1, 2))
        self._functions["softmax_forward"](self._at, shares.data_ptr())
        out = torch.bmm(shares, values)
        self._functions["attention_outputs"](self._at, out.data_ptr(), into.data_ptr(), into.stride(0))
        return queries, keys, values, shares

    def backward(self, d_out: InputGradient, out: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """See `Attention`."""
        del out
        queries, keys, values, shares = kept
        d_result = torch.empty_like(queries)
        self._functions["attention_outputs_backward"](self._at, ctypes.byref(_Split.of(d_out)), d_result.data_ptr())
        d_scores = torch.bmm(d_result, values.transpose(1, 2))
        self._functions["softmax_backward"](self._at, shares.data_ptr(), d_scores.data_ptr())
        d_queries = torch.bmm(d_scores, keys)
        d_keys = torch.bmm(d_scores.transpose(1, 2), queries)
        d_values = torch.bmm(shares.transpose(1, 2), d_result)
        gradient = queries.new_empty(len(d_out.whole), self._heads.all * self._heads.width)
        self._functions["attention_inputs_backward"](
            self._at, d_queries.data_ptr(), d_keys.data_ptr(), d_values.data_ptr(),
            self._rotary.cosine.data_ptr(), self._rotary.sine.data_ptr(), gradient.data_ptr(),
        )  # fmt: skip
        return gradient
