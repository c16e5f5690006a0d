"""The parts of a decoder's step between matrix products, compiled: the functions of `kernels.cpp` on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architecture import Activation
from ..attention import Attention, Heads
from ..attention_limits import Limits
from ..expert_linear import ExpertLinear, PlainExpertLinear
from ..expert_products import CountedProducts, ExpertProducts
from ..matrix_product import InputGradient, PlainProduct, Product
from ..operations import LogitScaling, Norm
from ..rotary import Rotary
from ..sequence_packing import PackedSequence
from . import compiled_experts
from .onednn_layout import packed_or_plain
from .stored_matrices import STORED, in_bf16_if_exact

_POINTER, _COUNT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "norm_forward": [_POINTER] * 6 + [_COUNT] * 3 + [_REAL],
    "norm_backward": [_POINTER] * 6 + [_COUNT],
    "norm_less_one_forward": [_POINTER] * 6 + [_COUNT] * 3 + [_REAL],
    "norm_less_one_backward": [_POINTER] * 6 + [_COUNT],
    "join": [_POINTER] * 2 + [_COUNT],
    "swiglu_forward": [_POINTER] * 2 + [_COUNT] * 3,
    "swiglu_backward": [_POINTER] * 3 + [_COUNT],
    "geglu_forward": [_POINTER] * 2 + [_COUNT] * 3,
    "geglu_backward": [_POINTER] * 3 + [_COUNT],
    "lower": [_POINTER, _COUNT, _POINTER, _POINTER] + [_COUNT] * 4,
    "add_product": [_POINTER] * 2 + [_COUNT, _POINTER, _REAL, _COUNT],
    "turn": [_POINTER] * 4 + [_COUNT],
    "attention_forward": [_POINTER] * 3 + [_COUNT, _POINTER],
    "attention_backward": [_POINTER] * 2,
    "cross_entropy": [_POINTER] * 3 + [_COUNT] * 2 + [_REAL],
    "scale_logits": [_POINTER] + [_COUNT] * 2 + [_REAL] * 2,
    "scaled_cross_entropy": [_POINTER] * 3 + [_COUNT] * 2 + [_REAL] * 3,
    "place": [_POINTER] * 4 + [_COUNT] * 2,
}
_PRODUCT = [_POINTER, _POINTER, _COUNT, _POINTER, _COUNT]
_PRODUCTS = ("product_forward", "product_backward")
"""With fp32 numbers, and matrices stored in a dtype; only for processors where PyTorch's products are slower."""
_NORMS = {0: "norm", 1: "norm_less_one"}
_GATED = {Activation.SILU: "swiglu", Activation.TANH_GELU: "geglu"}


class _Side(ctypes.Structure):
    """`Side` of adapters.h."""

    _fields_ = (("numbers", _POINTER), ("stride", _COUNT), ("width", _COUNT))

    @classmethod
    def of(cls, row: Tensor) -> _Side:
        return cls(row.data_ptr(), row.stride(0), row.shape[1])


class _Segments(ctypes.Structure):
    """`Segments` of attention.h."""

    _fields_ = (
        ("starts", _POINTER), ("lengths", _POINTER), ("fronts", _POINTER), ("front_starts", _POINTER),
        ("row_starts", _POINTER), ("shared", _POINTER), ("reads", _POINTER), ("read_starts", _POINTER),
        ("count", _COUNT), ("shared_count", _COUNT), ("queries", _COUNT), ("keys", _COUNT), ("depth", _COUNT),
        ("window", _COUNT), ("half", _COUNT), ("rest", _REAL), ("cap", _REAL),
    )  # fmt: skip


class _Backward(ctypes.Structure):
    """`Backward` of attention.h."""

    _fields_ = (
        ("qkv", _POINTER), ("out", _POINTER), ("d_out", _POINTER), ("out_stride", _COUNT), ("d_out_stride", _COUNT),
        ("log_sums", _POINTER), ("cosine", _POINTER), ("sine", _POINTER), ("d_qkv", _POINTER),
    )  # fmt: skip


class _Split(ctypes.Structure):
    """`Split` of kernels.cpp, over an `InputGradient`."""

    _fields_ = (
        ("whole", _POINTER), ("down", _POINTER), ("width", _COUNT), ("rank", _COUNT), ("stride", _COUNT),
    )  # fmt: skip

    @classmethod
    def of(cls, gradient: InputGradient) -> _Split:
        whole, down = gradient.whole, gradient.down
        down_address = None if down is None else down.data_ptr()
        return cls(whole.data_ptr(), down_address, gradient.width, 0 if down is None else len(down), whole.stride(0))


class _FrozenMatrix(ctypes.Structure):
    """`Matrix` of matrices.h."""

    _fields_ = (
        ("frozen", _POINTER), ("changing", _POINTER), ("outputs", _COUNT), ("inputs", _COUNT), ("rank", _COUNT),
    )  # fmt: skip


class CompiledOperations:
    """`Operations` by the compiled kernels.

    Args:
        library: from `build.ensure`.
        dtype: bf16 or fp32, of all tensors for which no dtype is stated.

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
        self.widens = not self._packs and hasattr(loaded, f"{_PRODUCTS[0]}_of_fp32")
        products = {f"{name}_{stored}": _PRODUCT for name in _PRODUCTS for stored in STORED.values()}
        for name, arguments in {**products, **compiled_experts.ARGUMENTS}.items() if self.widens else ():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, None
            self.functions[name] = function

    def product(self, weight: Tensor, changing: int) -> Product:
        if self._packs:
            return packed_or_plain(weight, changing, self.functions["place"])
        return CompiledProduct(weight, changing, self.functions) if self.widens else PlainProduct(weight)

    def lower(self, x: Tensor, down: Tensor, into: Tensor) -> None:
        tokens, width = x.shape
        if width % 2:  # the kernel reads bf16 numbers in pairs
            into.copy_(x @ down.t())
            return
        self.functions["lower"](
            x.data_ptr(), x.stride(0), down.data_ptr(), into.data_ptr(), into.stride(0), tokens, width, len(down)
        )

    def add_product(self, gradient: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
        thin, wide = _Side.of(left), _Side.of(right)
        transposed = left.shape[1] > right.shape[1]
        if transposed:
            thin, wide = wide, thin
        self.functions["add_product"](
            ctypes.byref(thin), ctypes.byref(wide), len(left), gradient.data_ptr(), factor, transposed
        )

    def expert_products(self, router: Tensor) -> ExpertProducts:
        return CountedProducts()

    def expert_linear(self, weight: Tensor, products: ExpertProducts) -> ExpertLinear:
        if self.widens:
            return compiled_experts.CompiledExpertLinear(weight, self.functions)
        return PlainExpertLinear(products, weight)

    def attention(self, packed: PackedSequence, heads: Heads, rotary: Rotary, limits: Limits) -> Attention:
        return CompiledAttention(self.functions, packed, heads, rotary, limits)

    def norm(self, norm: Norm, x: Tensor, added: Tensor | None, into: Tensor) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        factor = torch.empty(rows, 1, dtype=torch.float32)
        self.functions[f"{_NORMS[norm.stored_less]}_forward"](
            x.data_ptr(), None if added is None else added.data_ptr(), x.data_ptr(), norm.weight.data_ptr(),
            into.data_ptr(), factor.data_ptr(), rows, width, into.stride(0), norm.epsilon,
        )  # fmt: skip
        return x, factor

    def norm_backward(
        self, norm: Norm, d_out: InputGradient, x: Tensor, factor: Tensor, added: Tensor | None
    ) -> Tensor:
        gradient = torch.empty_like(x)
        self.functions[f"{_NORMS[norm.stored_less]}_backward"](
            ctypes.byref(_Split.of(d_out)), x.data_ptr(), norm.weight.data_ptr(), factor.data_ptr(),
            None if added is None else added.data_ptr(), gradient.data_ptr(), len(x),
        )  # fmt: skip
        return gradient

    def gate(self, activation: Activation, gate_up: Tensor, into: Tensor) -> None:
        self.functions[f"{_GATED[activation]}_forward"](
            gate_up.data_ptr(), into.data_ptr(), *into.shape, into.stride(0)
        )

    def gate_backward(self, activation: Activation, d_out: InputGradient, gate_up: Tensor) -> Tensor:
        gradient = torch.empty_like(gate_up)
        self.functions[f"{_GATED[activation]}_backward"](
            ctypes.byref(_Split.of(d_out)), gate_up.data_ptr(), gradient.data_ptr(), len(gate_up)
        )
        return gradient

    def cross_entropy(
        self, logits: Tensor, targets: Tensor, factor: float, scaling: LogitScaling
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(logits), dtype=torch.float32)
        arguments = logits.data_ptr(), targets.data_ptr(), losses.data_ptr(), *logits.shape, factor
        if scaling == LogitScaling():
            self.functions["cross_entropy"](*arguments)
        else:
            self.functions["scale_logits"](logits.data_ptr(), *logits.shape, scaling.factor, scaling.cap)
            self.functions["scaled_cross_entropy"](*arguments, scaling.factor, scaling.cap)
        return losses, logits


class CompiledProduct:
    """A `Product` by the compiled kernels, fp32.

    Weights are mostly published in bf16, which is half as much to keep and to read; they are widened on the way.

    Args:
        weight: ``[outputs, inputs]``, fp32 or bf16.
        changing: the first of these columns.
        functions: of the library.

    Attributes:
        frozen: the other columns, in bf16 if that holds them exactly.
    """

    def __init__(self, weight: Tensor, changing: int, functions: dict[str, Callable[..., None]]) -> None:
        self.frozen = in_bf16_if_exact(weight[:, :changing])
        self._changing = weight[:, changing:].to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        addresses = self.frozen.data_ptr(), self._changing.data_ptr()
        self._matrix = _FrozenMatrix(*addresses, len(weight), changing, self._changing.shape[1])
        stored = STORED[self.frozen.dtype]
        self._forward, self._backward = (functions[f"{name}_{stored}"] for name in _PRODUCTS)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = self._computed(self._forward, x, self._matrix.outputs)
        return out if bias is None else out.add_(bias)

    def backward(self, d_out: Tensor) -> Tensor:
        return self._computed(self._backward, d_out, self._matrix.inputs + self._matrix.rank)

    def replace(self, rows: slice, columns: slice, values: Tensor) -> None:
        inputs = self._matrix.inputs
        self._changing[rows, columns.start - inputs : columns.stop - inputs] = values

    def _computed(self, function: Callable[..., None], x: Tensor, width: int) -> Tensor:
        assert x.stride(1) == 1
        out = x.new_empty(len(x), width)
        function(ctypes.byref(self._matrix), x.data_ptr(), x.stride(0), out.data_ptr(), len(x))
        return out


class CompiledAttention:
    """`Attention` by the compiled kernels, for chats of any length."""

    def __init__(
        self,
        functions: dict[str, Callable[..., None]],
        packed: PackedSequence,
        heads: Heads,
        rotary: Rotary,
        limits: Limits,
    ) -> None:
        self._functions, self._heads, self._rotary = functions, heads, rotary
        self._tables = _segment_tables(packed)  # kept alive for `_segments`
        addresses = [table.data_ptr() for table in self._tables.values()]
        counts = len(packed.segments), len(self._tables["shared"])
        window = len(packed.ids) if limits.window is None else limits.window  # no segment sees more tokens
        self._segments = _Segments(
            *addresses, *counts, heads.queries, heads.keys, heads.width, window, rotary.rotated // 2, rotary.scale,
            limits.cap,
        )  # fmt: skip
        self._address = ctypes.addressof(self._segments)

    def forward(self, qkv: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        rotation = self._rotary.cosine.data_ptr(), self._rotary.sine.data_ptr()
        self._functions["turn"](self._address, qkv.data_ptr(), *rotation, len(qkv))
        log_sums = torch.empty(len(qkv), self._heads.queries, dtype=torch.float32)
        self._functions["attention_forward"](
            self._address, qkv.data_ptr(), into.data_ptr(), into.stride(0), log_sums.data_ptr()
        )
        return qkv, log_sums

    def backward(self, d_out: InputGradient, out: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        qkv, log_sums = kept
        gradient, d_mixed = torch.empty_like(qkv), qkv.new_empty(len(qkv), d_out.width)
        self._functions["join"](ctypes.byref(_Split.of(d_out)), d_mixed.data_ptr(), len(qkv))
        arguments = _Backward(
            qkv.data_ptr(), out.data_ptr(), d_mixed.data_ptr(), out.stride(0), d_mixed.stride(0),
            log_sums.data_ptr(), self._rotary.cosine.data_ptr(), self._rotary.sine.data_ptr(), gradient.data_ptr(),
        )  # fmt: skip
        self._functions["attention_backward"](self._address, ctypes.byref(arguments))
        return gradient


def _segment_tables(packed: PackedSequence) -> dict[str, Tensor]:
    """Return the tables of `Segments` by name, int64, in its order."""
    segments = packed.segments
    starts, lengths = torch.tensor([(segment.start, segment.length) for segment in segments]).t().contiguous()
    fronts = torch.cat([segment.front for segment in segments])
    is_seen = torch.zeros(len(packed.ids), dtype=torch.bool)
    is_seen[fronts] = True
    # What others see of a segment are its first tokens, so its rows are those of what it sees: its front, and those.
    seen = [int(is_seen[segment.start : segment.end].sum()) for segment in segments]
    rows = [
        torch.cat([segment.front, segment.start + torch.arange(count)])
        for segment, count in zip(segments, seen, strict=True)
    ]
    sorted_rows, reads = torch.cat(rows).sort(stable=True)
    shared, counts = torch.unique_consecutive(sorted_rows, return_counts=True)
    return {
        "starts": starts,
        "lengths": lengths,
        "fronts": fronts,
        "front_starts": _ends([len(segment.front) for segment in segments]),
        "row_starts": _ends(list(map(len, rows))),
        "shared": shared,
        "reads": reads,
        "read_starts": _ends(counts.tolist()),
    }


def _ends(lengths: Sequence[int]) -> Tensor:
    """Return where things of these lengths begin that lie end to end, and the end of the last."""
    return torch.tensor([0, *accumulate(lengths)])
