"""Decoders of Llama's kind with hand-written forward and backward passes over packed sequences.

Notable decisions:

- A training step of an adapter needs a third less work than with autograd, and computes the same; tests compare both.
- No gradients of frozen weights; the first layer's input has none at all.
- No padding: chats are packed end to end, and a shared prefix is computed once.
- One matrix product where transformers has three (queries, keys, values) or two (gate, up), adapters included.
- Logits only where a label is next, some at a time; the last layer computes its MLP only there.
- Norms return their fp32 factor. What they write is computed again for the backward pass: that is quick, and kept it
  would be an eighth of all that is kept.
- Families differ in what layers have (`Layer`), `AttentionSetting`, `Activation` and `Factors`, not in the passes.
- Activations are kept, or recomputed layer by layer with the same random numbers when memory is short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from .attention import Attention, Heads
from .attention_limits import Limits, cap_scores
from .embedding_noise import packed_noise
from .fused_linear import FusedLinear
from .lora import FlatAdapters
from .matrix_product import InputGradient, Product
from .memory import LOGITS_AT_ONCE
from .mlp import Mlp, SavedMlp
from .offloading import HostInputs
from .operations import LogitScaling, Norm, Operations
from .rotary import Rotary
from .sequence_packing import PackedSequence
from .token_rows import VocabularyRows
from .transfers import random_state, set_random_state, sum_dtype, to_device

Derivative: TypeAlias = Callable[[Tensor], Tensor]
"""From the cross-entropy of each label, fp32 ``[labels]``, the derivative of a loss with respect to each."""


@dataclass
class Layer:
    """One decoder layer's frozen weights with their adapters.

    Attributes:
        setting: index of its attention's setting.
        attention_norm, mlp_norm: in front of attention and MLP; None where there is none (OLMo 2).
        qkv, out: the linear layers of its attention.
        mlp: its MLP.
        attention_norm_after, mlp_norm_after: of what attention and MLP add (Gemma 2, OLMo 2).
        query_norm, key_norm: of each head (Qwen 3), or of all heads together (OLMo 2).
    """

    setting: int
    attention_norm: Norm | None
    qkv: FusedLinear
    out: FusedLinear
    mlp_norm: Norm | None
    mlp: Mlp
    attention_norm_after: Norm | None = None
    mlp_norm_after: Norm | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        return self.qkv, self.out, *self.mlp.linears


@dataclass(frozen=True)
class AttentionSetting:
    """What the attention of some layers has in common.

    Attributes:
        limits: see `Limits`.
        frequencies: fp32 ``[rotated / 2]``, of the rotary embedding; empty if queries and keys are not turned.
        rotary_factor: of cosine and sine.
        scale: factor of both queries and keys.
    """

    limits: Limits
    frequencies: Tensor
    rotary_factor: float
    scale: float


@dataclass(frozen=True)
class Factors:
    """Constants by which a decoder multiplies.

    Attributes:
        embeddings: factor of the embeddings.
        added: factor of what attention and MLP add.
        logits: see `LogitScaling`.
        noise: factor of the noise on the embeddings.
    """

    embeddings: float
    added: float
    logits: LogitScaling
    noise: float


@dataclass
class Decoder:
    """A whole model.

    Attributes:
        heads: see `Heads`.
        settings: of the layers' attention.
        layers: in order.
        factors: see `Factors`.
        embedding: ``[vocabulary, width]``; on the host if its memory on the device is needed for more, and in the dtype
            of `head`'s matrix if it is that.
        head: computes the logits.
        norm: in front of the head.
        operations: computes the elementwise parts.
        rows: of new tokens.
    """

    heads: Heads
    settings: list[AttentionSetting]
    layers: list[Layer]
    factors: Factors
    embedding: Tensor
    head: Product
    norm: Norm
    operations: Operations
    rows: VocabularyRows | None = None

    def join(self, flat: FlatAdapters) -> None:
        """Let the linear layers read their adapters from the flat tensor."""
        for layer in self.layers:
            for linear in layer.linears:
                linear.join(flat)

    def refresh(self) -> None:
        """Take over the current values of the adapters."""
        for layer in self.layers:
            for linear in layer.linears:
                linear.refresh()

    def reset(self) -> None:
        """Give the adapters' magnitudes, if they have some, the values with which they change nothing."""
        for layer in self.layers:
            for linear in layer.linears:
                linear.reset()

    @torch.no_grad()
    def loss(self, packed: PackedSequence) -> Tensor:
        """Return the summed cross-entropy of the labels, fp64 ``[]``, without gradients or dropout."""
        if not packed.labels:
            return self._no_loss()
        sequence = _SequencePass(self, packed)
        x, added = self._embed(packed), None
        for index, layer in enumerate(self.layers):
            x, added = sequence.forward(layer, x, added, None, last=index == len(self.layers) - 1)
        return self._head(x, added, packed, 0.0)[1]

    @torch.no_grad()
    def label_losses(self, packed: PackedSequence) -> Tensor:
        """Return the cross-entropy of each label, fp32 ``[labels]``, without gradients or dropout."""
        if not packed.labels:
            return torch.zeros(0)
        sequence = _SequencePass(self, packed)
        x, added = self._embed(packed), None
        for index, layer in enumerate(self.layers):
            x, added = sequence.forward(layer, x, added, None, last=index == len(self.layers) - 1)
        label_losses: list[Tensor] = []

        def keep(losses: Tensor) -> Tensor:
            label_losses.append(losses)
            return losses

        self._head(x, added, packed, 0.0, keep)
        return label_losses[0]

    @torch.no_grad()
    def states(self, packed: PackedSequence, attentions: Sequence[Attention] | None = None) -> Tensor:
        """Return what the head reads of each token, ``[tokens, width]``, without dropout.

        Args:
            packed: the tokens.
            attentions: for each of `settings`, in place of those for one packed sequence.
        """
        sequence = _SequencePass(self, packed, attentions)
        x, added = self._embed(packed), None
        for layer in self.layers:
            x, added = sequence.forward(layer, x, added, None, last=False)
        normed = torch.empty_like(x)
        self.operations.norm(self.norm, x, added, normed)
        return normed

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits ``[tokens, vocabulary]`` of some of the `states`, scaled."""
        logits = self.head.forward(states, None)
        if self.factors.logits.factor != 1.0:
            logits.mul_(self.factors.logits.factor)
        cap_scores(logits, self.factors.logits.cap)
        return logits

    @torch.no_grad()
    def backward(
        self,
        packed: PackedSequence,
        factor: float,
        recompute: bool,
        noise: float = 0.0,
        derivative: Derivative | None = None,
        inputs: HostInputs | None = None,
    ) -> Tensor:
        """Add ``factor`` times the loss's gradient to the adapters' gradients.

        Args:
            packed: the chats.
            factor: of the loss.
            recompute: keep only each layer's input, and recompute the rest in the backward pass.
            noise: alpha of NEFTune; the chats share nothing then.
            derivative: of another loss than the sum of the labels' cross-entropies, whose gradient is added instead.
            inputs: keeps the layers' inputs of a step that recomputes; None: they stay on the device.

        Returns:
            The summed cross-entropy of the labels, fp64 ``[]`` (fp32 where a device has no fp64).
        """
        if not packed.labels:
            return self._no_loss()
        sequence = _SequencePass(self, packed)
        x, added = self._embed(packed), None
        if noise:
            x += packed_noise(packed.lengths, x.shape[1], noise, x.device).mul_(self.factors.noise).to(x.dtype)
        kept: list[_SavedActivations] = []
        for index, layer in enumerate(self.layers):
            kept.append(_SavedActivations(random_state(x.device) if recompute else None))
            x, added = sequence.forward(layer, x, added, kept[-1], last=index == len(self.layers) - 1)
            if inputs is not None and kept[-1].x is not None:
                inputs.store(index, kept[-1].x)
                kept[-1].x = None
        d_x: Tensor | None
        d_x, loss = self._head(x, added, packed, factor, derivative)
        for index in reversed(range(len(self.layers))):
            saved = kept.pop()
            if recompute:
                if inputs is not None:
                    saved.x = inputs.fetch(index)
                saved = sequence.recompute(self.layers[index], saved, last=index == len(self.layers) - 1)
            assert d_x is not None
            d_x = sequence.backward(self.layers[index], d_x, saved, first=index == 0 and self.rows is None)
        if self.rows is not None and d_x is not None:
            self.rows.embedding.look_up_backward(packed.ids, d_x, self.factors.embeddings)
        return loss

    def _no_loss(self) -> Tensor:
        device = self.norm.weight.device
        return torch.zeros((), dtype=sum_dtype(device), device=device)

    def _embed(self, packed: PackedSequence) -> Tensor:
        x = to_device(self.embedding[packed.ids], packed.positions.device).to(self.norm.weight.dtype)
        if self.rows is not None:
            self.rows.embedding.look_up(packed.ids, x)
        return x if self.factors.embeddings == 1.0 else x.mul_(self.factors.embeddings)

    def _head(
        self,
        x: Tensor,
        added: Tensor | None,
        packed: PackedSequence,
        factor: float,
        derivative: Derivative | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of ``x + added``, the last layer's output where a label is next, and the summed loss.

        Logits are computed and freed in blocks. With a factor of 0 there is no gradient, and the first value is unused.
        """
        normed = torch.empty_like(x)
        x, norm_factor = self.operations.norm(self.norm, x, added, normed)
        total, gradients, all_losses, of_rows = self._no_loss(), [], [], []
        for start in range(0, packed.labels, LOGITS_AT_ONCE):
            block = slice(start, start + LOGITS_AT_ONCE)
            logits = self.head.forward(normed[block], None)
            if self.rows is not None:
                self.rows.head.add_logits(normed[block], logits)
            losses, gradient = self.operations.cross_entropy(logits, packed.targets[block], factor, self.factors.logits)
            del logits
            weights = None if packed.weights is None else packed.weights[block]
            total += (losses if weights is None else losses * weights).sum()
            all_losses.append(losses)
            if factor:
                d_part = self.head.backward(gradient)
                if self.rows is not None:
                    of_rows.append(gradient[:, self.rows.head.columns()].clone())
                    d_part += self.rows.head.logits_backward(of_rows[-1])
                    if weights is not None:
                        of_rows[-1].mul_(weights[:, None])
                gradients.append(d_part if weights is None else d_part.mul_(weights[:, None]))
        # A gradient is linear in the factor of its label, so a loss of all labels needs no second pass.
        factors = None if derivative is None else derivative(torch.cat(all_losses))
        if not gradients:
            return x, total
        d_logits = torch.cat(gradients)
        if factors is not None:
            d_logits.mul_(factors[:, None])
        if self.rows is not None:
            d_rows = torch.cat(of_rows)
            self.rows.head.add_head_gradient(d_rows if factors is None else d_rows * factors[:, None], normed)
        d_normed = InputGradient(d_logits, x.shape[1], None)
        return self.operations.norm_backward(self.norm, d_normed, x, norm_factor, None), total


@dataclass
class _SavedActivations:
    """What a layer's backward pass needs of its forward pass."""

    random_state: Tensor | None  # only when everything but x is recomputed
    x: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    attention: tuple[Tensor, ...] = ()
    masks: dict[str, list[Tensor]] = field(default_factory=dict)
    mlp: SavedMlp = field(default_factory=SavedMlp)


class _SequencePass:
    """The passes of one packed sequence through the layers."""

    def __init__(self, decoder: Decoder, packed: PackedSequence, attentions: Sequence[Attention] | None = None) -> None:
        self.heads, self.operations = decoder.heads, decoder.operations
        self.added = decoder.factors.added
        self.tokens, self.labelled = len(packed.ids), packed.label_positions
        self.attentions = attentions or [self._attention(packed, decoder, setting) for setting in decoder.settings]

    def _attention(self, packed: PackedSequence, decoder: Decoder, setting: AttentionSetting) -> Attention:
        rotary = Rotary.of(
            packed.positions, setting.frequencies, decoder.norm.weight.dtype, setting.scale, setting.rotary_factor
        )
        return self.operations.attention(packed, decoder.heads, rotary, setting.limits)

    def forward(
        self, layer: Layer, x: Tensor, added: Tensor | None, kept: _SavedActivations | None, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute a layer's output as two terms of a sum, from ``x + added``, both ``[tokens, width]``.

        Args:
            layer: the layer.
            x: its memory is reused for the sum.
            added: None stands for zero.
            kept: in training, receives what `backward` needs, and turns dropout on.
            last: compute only the positions where a label is next: nothing else is read.
        """
        masks: dict[str, list[Tensor] | None] = {name: [] if kept is not None else None for name in ("qkv", "out")}
        normed = layer.qkv.new_input(self.tokens)
        x, factor = self._normed(layer.attention_norm, x, added, normed[:, : layer.qkv.inputs])
        qkv = layer.qkv.forward(normed, masks["qkv"])
        headed, head_kept = self._normed_heads(layer, qkv)
        attended = layer.out.new_input(self.tokens)
        mixed = attended[:, : layer.out.inputs]
        attention_kept = self.attentions[layer.setting].forward(headed, mixed)
        if last:
            attended, residual = attended[self.labelled], x[self.labelled]
        else:
            residual = x
        out = layer.out.forward(attended, masks["out"])
        attention_out, out_kept = self._added(layer.attention_norm_after, out, "out")
        mlp_normed = layer.mlp.new_input(len(attended))
        middle, mlp_factor = self._normed(layer.mlp_norm, attention_out, residual, mlp_normed[:, : layer.mlp.inputs])
        saved_mlp = None if kept is None else SavedMlp()
        result, down_kept = self._added(layer.mlp_norm_after, layer.mlp.forward(mlp_normed, saved_mlp), "down")
        if kept is not None:
            kept.x = x
            if kept.random_state is None:
                kept.attention, kept.mlp = attention_kept, saved_mlp or SavedMlp()
                kept.masks = {name: each for name, each in masks.items() if each}
                kept.tensors = head_kept | out_kept | down_kept | {
                    "low": normed[:, layer.qkv.inputs :].clone(), "factor": factor, "mixed": mixed,
                    "attended": attended, "middle": middle, "mlp_low": mlp_normed[:, layer.mlp.inputs :].clone(),
                    "mlp_factor": mlp_factor,
                }  # fmt: skip
        return result, middle

    def recompute(self, layer: Layer, kept: _SavedActivations, last: bool) -> _SavedActivations:
        """Repeat a layer's forward pass with the same random numbers, for its backward pass."""
        assert kept.random_state is not None and kept.x is not None
        before = random_state(kept.x.device)
        set_random_state(kept.random_state, kept.x.device)
        whole = _SavedActivations(None)
        self.forward(layer, kept.x, None, whole, last)
        set_random_state(before, kept.x.device)
        return whole

    def backward(self, layer: Layer, d_out: Tensor, kept: _SavedActivations, first: bool) -> Tensor | None:
        """Return the gradient of the layer's input; None for the first layer, whose input is frozen."""
        saved, masks = kept.tensors, kept.masks
        d_down = self._added_backward(layer.mlp_norm_after, d_out, saved, "down")
        mlp_normed = self._normed_again(layer.mlp_norm, saved["middle"], saved["mlp_low"], layer.mlp)
        d_normed = layer.mlp.backward(d_down, mlp_normed, kept.mlp)
        d_middle = self._normed_backward(layer.mlp_norm, d_normed, saved["middle"], saved["mlp_factor"], d_out)
        d_attention = self._added_backward(layer.attention_norm_after, d_middle, saved, "out")
        d_mixed = layer.out.backward(d_attention, saved["attended"], masks.get("out"))
        if len(d_out) < self.tokens:  # the last layer
            d_mixed, d_middle = replace(d_mixed, whole=self._spread(d_mixed.whole)), self._spread(d_middle)
        d_headed = self.attentions[layer.setting].backward(d_mixed, saved["mixed"], kept.attention)
        d_qkv = self._normed_heads_backward(layer, d_headed, saved)
        assert kept.x is not None
        normed = self._normed_again(layer.attention_norm, kept.x, saved["low"], layer.qkv)
        if first:
            layer.qkv.backward_of_frozen(d_qkv, normed, masks.get("qkv"))
            return None
        d_normed = layer.qkv.backward(d_qkv, normed, masks.get("qkv"))
        return self._normed_backward(layer.attention_norm, d_normed, kept.x, saved["factor"], d_middle)

    def _spread(self, labelled: Tensor) -> Tensor:
        """Expand ``[labels, ...]`` to ``[tokens, ...]``, with 0 elsewhere."""
        return labelled.new_zeros(self.tokens, labelled.shape[1]).index_copy_(0, self.labelled, labelled)

    def _normed(self, norm: Norm | None, x: Tensor, added: Tensor | None, into: Tensor) -> tuple[Tensor, Tensor]:
        """As `Operations.norm`; without a norm the sum itself goes into `into`."""
        if norm is not None:
            return self.operations.norm(norm, x, added, into)
        total = x if added is None else x.add_(added)
        into.copy_(total)
        return total, total.new_empty(0)

    def _normed_again(self, norm: Norm | None, x: Tensor, low: Tensor, linear: FusedLinear | Mlp) -> Tensor:
        """Return the input of a linear layer as `forward` made it from ``x``, with the product of its adapters."""
        whole = linear.new_input(len(x))
        self._normed(norm, x, None, whole[:, : linear.inputs])
        whole[:, linear.inputs :] = low
        return whole

    def _normed_backward(
        self, norm: Norm | None, d_out: InputGradient, x: Tensor, factor: Tensor, added: Tensor
    ) -> Tensor:
        """Return the gradient of x plus `added`."""
        if norm is not None:
            return self.operations.norm_backward(norm, d_out, x, factor, added)
        return d_out.sum() + added

    def _added(self, norm: Norm | None, out: Tensor, block: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what attention or MLP adds to the residual connection, and what `_added_backward` needs.

        Args:
            norm: of what is added.
            out: the output of its last linear layer; its memory may be overwritten.
            block: that layer: "out" or "down".
        """
        if norm is not None:
            added = torch.empty_like(out)
            out, factor = self.operations.norm(norm, out, None, added)
            return added, {f"{block} output": out, f"{block} factor": factor}
        return (out if self.added == 1.0 else out.mul_(self.added)), {}

    def _added_backward(self, norm: Norm | None, d_added: Tensor, saved: dict[str, Tensor], block: str) -> Tensor:
        """Return the gradient of `out` of `_added`."""
        if norm is not None:
            gradient = InputGradient(d_added, d_added.shape[1], None)
            return self.operations.norm_backward(
                norm, gradient, saved[f"{block} output"], saved[f"{block} factor"], None
            )
        return d_added if self.added == 1.0 else d_added * self.added

    def _normed_heads(self, layer: Layer, qkv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return queries, keys and values ``[tokens, heads.all * d]``, normalized where the model does that."""
        if layer.query_norm is None or layer.key_norm is None:
            return qkv, {}
        headed, factors = torch.empty_like(qkv), []
        headed[:, self._keys.stop :] = qkv[:, self._keys.stop :]
        for norm, columns in ((layer.query_norm, self._queries), (layer.key_norm, self._keys)):
            normed, factor = norm.forward(torch.unflatten(qkv[:, columns], 1, (-1, len(norm.weight))))
            headed[:, columns] = normed.flatten(1)
            factors.append(factor)
        return headed, {"qkv": qkv, "query_factor": factors[0], "key_factor": factors[1]}

    def _normed_heads_backward(self, layer: Layer, d_headed: Tensor, saved: dict[str, Tensor]) -> Tensor:
        """Return the gradient of the input of `_normed_heads` ``[tokens, heads.all * d]``; it replaces `d_headed`."""
        d_headed = d_headed.view(self.tokens, -1)
        if layer.query_norm is not None and layer.key_norm is not None:
            for norm, columns, factor in (
                (layer.query_norm, self._queries, saved["query_factor"]),
                (layer.key_norm, self._keys, saved["key_factor"]),
            ):
                part, x = (
                    torch.unflatten(each[:, columns], 1, (-1, len(norm.weight))) for each in (d_headed, saved["qkv"])
                )
                part.copy_(norm.backward(part, x, factor))
        return d_headed

    @property
    def _queries(self) -> slice:
        return slice(self.heads.queries * self.heads.width)

    @property
    def _keys(self) -> slice:
        start = self._queries.stop
        return slice(start, start + self.heads.keys * self.heads.width)
