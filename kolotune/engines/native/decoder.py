"""Decoders of the Llama family, forwards and backwards by hand over packed chats.

Written out because the training step of an adapter needs a third less than what automatic differentiation does: no
gradients of frozen weights, no padding, one product where transformers makes three, logits only where there is a
label. It computes what transformers computes; tests hold the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention, Heads, attention_for
from .fused import FusedLinear
from .lora import FlatAdapters
from .packing import Packed

_LOGITS_AT_ONCE = 512  # rows of logits that are in memory together
_rms_norm: Any = torch.ops.aten._fused_rms_norm
_silu_backward: Any = torch.ops.aten.silu_backward


@dataclass
class Norm:
    """Root-mean-square normalisation (Zhang and Sennrich, 2019) with a frozen weight ``[width]``."""

    weight: Tensor
    epsilon: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., width]`` normalised, and the fp32 factor ``[..., 1]`` that `backward` needs."""
        result: tuple[Tensor, Tensor] = _rms_norm(x, [len(self.weight)], self.weight, self.epsilon)
        return result

    def __post_init__(self) -> None:
        self._exact = self.weight.float()

    def backward(self, d_out: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        """The gradient of x, in x's dtype."""
        unit = x * factor  # fp32, as the factor is
        scaled = d_out * self._exact
        shared = (scaled * unit).mean(-1, keepdim=True)
        return torch.addcmul(scaled, unit, shared, value=-1).mul_(factor).to(x.dtype)


@dataclass
class Layer:
    """One decoder layer's frozen weights with their adapters.

    `query_norm` and `key_norm` are there in models that normalise each head (Qwen 3).
    """

    attention_norm: Norm
    qkv: FusedLinear
    out: FusedLinear
    mlp_norm: Norm
    gate_up: FusedLinear
    down: FusedLinear
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        return self.qkv, self.out, self.gate_up, self.down


@dataclass
class Decoder:
    """A whole model.

    Attributes:
        heads: see `Heads`.
        layers: in order.
        embedding: ``[vocabulary, width]``; head: the same when the two are tied.
        norm: before the head.
        frequencies: fp32 ``[head width / 2]``, of the rotary position embedding (Su et al., 2021).
        rotary_scale: what cosines and sines are multiplied by.
    """

    heads: Heads
    layers: list[Layer]
    embedding: Tensor
    head: Tensor
    norm: Norm
    frequencies: Tensor
    rotary_scale: float = 1.0

    def join(self, flat: FlatAdapters) -> None:
        """Finds the adapters in the row that they have become parts of."""
        for layer in self.layers:
            for linear in layer.linears:
                linear.join(flat)

    def refresh(self) -> None:
        """Takes the adapters as they stand now."""
        for layer in self.layers:
            for linear in layer.linears:
                linear.refresh()

    @torch.no_grad()
    def loss(self, packed: Packed) -> float:
        """The summed cross-entropy of the labelled tokens, without gradients or dropout."""
        row = _Row(self, packed)
        x = self.embedding[packed.ids]
        for layer in self.layers:
            x = row.forward(layer, x, None)
        normed, _ = self.norm.forward(x[packed.rows])
        return sum(float(_losses(part, self.head, wanted)[0]) for part, wanted in _in_parts(normed, packed.targets))

    @torch.no_grad()
    def backward(self, packed: Packed, factor: float, recompute: bool) -> float:
        """Adds ``factor`` times the loss's gradient to the adapters' gradients.

        Args:
            packed: the chats.
            factor: the loss is multiplied by it.
            recompute: keep only each layer's input and compute the rest again on the way back.

        Returns:
            The summed cross-entropy of the labelled tokens.
        """
        row = _Row(self, packed)
        x = self.embedding[packed.ids]
        kept: list[_Kept] = []
        for layer in self.layers:
            kept.append(_Kept(x, torch.get_rng_state() if recompute else None))
            x = row.forward(layer, x, None if recompute else kept[-1], training=True)
        d_x, loss = self._head_backward(x, packed, factor)
        for index in reversed(range(len(self.layers))):
            saved = kept.pop()
            if recompute:
                saved = row.again(self.layers[index], saved)
            d_x = row.backward(self.layers[index], d_x, saved, first=index == 0)
        return loss

    def _head_backward(self, x: Tensor, packed: Packed, factor: float) -> tuple[Tensor, float]:
        """The gradient of the last layer's output, and the summed loss. Logits are freed part by part."""
        chosen = x[packed.rows]
        normed, norm_factor = self.norm.forward(chosen)
        total, gradients = 0.0, []
        for part, wanted in _in_parts(normed, packed.targets):
            loss, logs = _losses(part, self.head, wanted)
            total += float(loss)
            shares = logs.exp_()
            shares[torch.arange(len(wanted)), wanted] -= 1
            gradients.append(shares.mul_(factor).to(x.dtype) @ self.head)
        d_x = torch.zeros_like(x)
        if gradients:
            d_x[packed.rows] = self.norm.backward(torch.cat(gradients), chosen, norm_factor)
        return d_x, total


def _in_parts(normed: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    if not len(targets):
        return []
    return list(zip(torch.split(normed, _LOGITS_AT_ONCE), torch.split(targets, _LOGITS_AT_ONCE), strict=True))


def _losses(normed: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy, fp32 ``[]``, and the log-probabilities, fp32 ``[labels, vocabulary]``."""
    logs = torch.log_softmax(normed @ head.t(), -1, dtype=torch.float32)
    return -logs.gather(1, targets[:, None]).sum(), logs


@dataclass
class _Kept:
    """What a layer's backward pass needs of its forward pass."""

    x: Tensor
    random_state: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    attention: tuple[Tensor, ...] = ()
    masks: dict[str, list[Tensor]] = field(default_factory=dict)


class _Row:
    """One packed row on its way through the layers."""

    def __init__(self, decoder: Decoder, packed: Packed) -> None:
        self.heads = decoder.heads
        self.tokens = len(packed.ids)
        self.attention: Attention = attention_for(packed, decoder.heads, decoder.embedding.dtype)
        angles = packed.positions[:, None].float() * decoder.frequencies
        # Scores are divided by the root of the width; here each of the two factors takes half of that.
        scale = decoder.rotary_scale * decoder.heads.width**-0.25
        self.cosine = (angles.cos() * scale).to(decoder.embedding.dtype)[:, None]
        self.sine = (angles.sin() * scale).to(decoder.embedding.dtype)[:, None]

    def forward(self, layer: Layer, x: Tensor, kept: _Kept | None, training: bool = False) -> Tensor:
        """``[row, width]`` to the same; in training dropout draws, and `kept` takes what `backward` needs."""
        masks: dict[str, list[Tensor] | None] = {
            name: [] if training else None for name in ("qkv", "out", "gate_up", "down")
        }
        normed, factor = self._normed(layer.attention_norm, x, layer.qkv)
        qkv = layer.qkv.forward(normed, masks["qkv"])
        rotated, head_kept = self._rotated(layer, qkv)
        mixed, attention_kept = self.attention.forward(rotated)
        attended = layer.out.room(len(x))
        attended[:, : layer.out.inputs] = mixed
        middle = layer.out.forward(attended, masks["out"]).add_(x)
        mlp_normed, mlp_factor = self._normed(layer.mlp_norm, middle, layer.gate_up)
        gate_up = layer.gate_up.forward(mlp_normed, masks["gate_up"])
        gate, up = gate_up.chunk(2, 1)
        product = layer.down.room(len(x))
        torch.mul(nn.functional.silu(gate), up, out=product[:, : layer.down.inputs])
        result = layer.down.forward(product, masks["down"]).add_(middle)
        if kept is not None:
            kept.attention = attention_kept
            kept.masks = {name: each for name, each in masks.items() if each}
            kept.tensors = head_kept | {
                "normed": normed, "factor": factor, "attended": attended, "middle": middle, "mlp_normed": mlp_normed,
                "mlp_factor": mlp_factor, "gate_up": gate_up, "product": product,
            }  # fmt: skip
        return result

    def again(self, layer: Layer, kept: _Kept) -> _Kept:
        """A layer's forward pass once more, with the same draws, for its backward pass."""
        before = torch.get_rng_state()
        assert kept.random_state is not None
        torch.set_rng_state(kept.random_state)
        self.forward(layer, kept.x, kept, training=True)
        torch.set_rng_state(before)
        return kept

    def backward(self, layer: Layer, d_out: Tensor, kept: _Kept, first: bool) -> Tensor:
        """The gradient of the layer's input; for the first layer, whose input is frozen, nothing of use."""
        saved, masks = kept.tensors, kept.masks
        gate, up = saved["gate_up"].chunk(2, 1)
        d_product = layer.down.backward(d_out, saved["product"], masks.get("down"))
        d_gate_up = torch.empty_like(saved["gate_up"])
        d_gate, d_up = d_gate_up.chunk(2, 1)
        torch.mul(d_product, nn.functional.silu(gate), out=d_up)
        _silu_backward.grad_input(d_product * up, gate, grad_input=d_gate)
        d_normed = layer.gate_up.backward(d_gate_up, saved["mlp_normed"], masks.get("gate_up"))
        d_middle = layer.mlp_norm.backward(d_normed, saved["middle"], saved["mlp_factor"]).add_(d_out)
        d_mixed = layer.out.backward(d_middle, saved["attended"], masks.get("out"))
        d_rotated = self.attention.backward(d_mixed, kept.attention)
        d_qkv = self._unrotated(layer, d_rotated, saved)
        d_normed = layer.qkv.backward(d_qkv, saved["normed"], masks.get("qkv"), whole=not first)
        if first:
            return d_normed
        return layer.attention_norm.backward(d_normed, kept.x, saved["factor"]).add_(d_middle)

    def _normed(self, norm: Norm, x: Tensor, into: FusedLinear) -> tuple[Tensor, Tensor]:
        room = into.room(len(x))
        normed, factor = norm.forward(x)
        room[:, : into.inputs] = normed
        return room, factor

    def _rotated(self, layer: Layer, qkv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Queries, keys and values ``[row, heads.all, d]``, the first two turned by their positions."""
        shaped = qkv.view(self.tokens, self.heads.all, self.heads.width)
        kept: dict[str, Tensor] = {}
        turned = self.heads.queries + self.heads.keys
        given = shaped[:, :turned]
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, query_factor = layer.query_norm.forward(given[:, : self.heads.queries])
            keys, key_factor = layer.key_norm.forward(given[:, self.heads.queries :])
            given = torch.cat([queries, keys], 1)
            kept = {"qkv": qkv, "query_factor": query_factor, "key_factor": key_factor}
        rotated = torch.empty_like(shaped)
        rotated[:, turned:] = shaped[:, turned:]
        _rotate(given, self.cosine, self.sine, 1, rotated[:, :turned])
        return rotated.view(self.tokens, -1), kept

    def _unrotated(self, layer: Layer, gradient: Tensor, saved: dict[str, Tensor]) -> Tensor:
        """The gradient of qkv ``[row, heads.all * d]`` from that of what `_rotated` made."""
        turned = self.heads.queries + self.heads.keys
        result = torch.empty_like(gradient)
        result[:, turned:] = gradient[:, turned:]
        _rotate(gradient[:, :turned], self.cosine, self.sine, -1, result[:, :turned])
        if layer.query_norm is not None and layer.key_norm is not None:
            shaped = saved["qkv"].view_as(result)
            split = self.heads.queries
            queries = layer.query_norm.backward(result[:, :split], shaped[:, :split], saved["query_factor"])
            result[:, split:turned] = layer.key_norm.backward(
                result[:, split:turned], shaped[:, split:turned], saved["key_factor"]
            )
            result[:, :split] = queries
        return result.view(self.tokens, -1)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, direction: int, out: Tensor) -> None:
    """Turns ``x [row, heads, d]`` into `out`; direction -1 turns back what 1 turned, up to the scale's square."""
    left, right = x.chunk(2, -1)
    out_left, out_right = out.chunk(2, -1)
    torch.mul(left, cosine, out=out_left).addcmul_(right, sine, value=-direction)
    torch.mul(right, cosine, out=out_right).addcmul_(left, sine, value=direction)
