"""Greedy answers to several prompts, a token of each at a time, with the keys and values of what was read kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attention import Attention, apply_rotary
from .attention_limits import cap_scores
from .decoder import AttentionSetting, Decoder
from .matrix_product import InputGradient
from .rotary import Rotary
from .sequence_packing import PackedSequence
from .shared_sequences import share

_ADDED = 32  # tokens for which memory is added at a time


class GrowingAnswers:
    """The answers so far.

    Keys and values of all open answers end in the same column, so that a token's are written and read without an index:
    shorter prompts begin in a later one.

    Args:
        decoder: computes them; what an adapter adds is decided by its linear layers.
        prompts: ids.
        end: the token that ends an answer.

    Attributes:
        answers: ids, with the end token last if there is one.
        open: numbers of the prompts whose answers have not ended.
        steps: how many tokens of each open answer there are.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], end: int) -> None:
        self._decoder, self._end = decoder, end
        self._shared = share(prompts, range(len(prompts)))
        lengths = torch.tensor(list(map(len, prompts)))
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.open = list(range(len(prompts)))
        self.steps = 0
        self._columns = int(lengths.max())
        self._begins = self._columns - lengths  # the first column of each open answer
        heads, layers = decoder.heads, len(decoder.layers)
        # Keys and values of each layer, [layers, open answers, key heads, columns, width of a head].
        size = layers, len(prompts), heads.keys, self._columns + _ADDED, heads.width
        self._keys, self._values = (torch.zeros(size) for _ in "kv")

    def read_prompts(self) -> None:
        """Read all prompts, and add the first token of each answer."""
        packed, layer = self._shared.packed, _Counter()
        attentions = [
            _Remembering(self, layer, setting, _rotary(setting, packed.positions), packed)
            for setting in self._decoder.settings
        ]
        states = self._decoder.states(packed, attentions)
        self._add(states[torch.stack([path[-1] for path in self._shared.paths])])

    def step(self) -> None:
        """Add a token to each open answer."""
        positions = self._columns - self._begins
        if self._columns == self._keys.shape[3]:
            more = (0, 0, 0, _ADDED)
            self._keys, self._values = (nn.functional.pad(each, more) for each in (self._keys, self._values))
        self._columns += 1
        ids, none = torch.tensor([self.answers[number][-1] for number in self.open]), torch.zeros(0, dtype=torch.int64)
        packed = PackedSequence(ids, positions, 0, (), (), label_positions=none, targets=none)
        layer = _Counter()
        attentions = [
            _Reading(self, layer, setting, _rotary(setting, positions), self._begins, self._columns)
            for setting in self._decoder.settings
        ]
        self._add(self._decoder.states(packed, attentions))

    def _add(self, states: Tensor) -> None:
        for number, token in zip(list(self.open), self._decoder.logits(states).argmax(1).tolist(), strict=True):
            self.answers[number].append(token)
        kept = [at for at, number in enumerate(self.open) if self.answers[number][-1] != self._end]
        if len(kept) < len(self.open):
            self.open = [self.open[at] for at in kept]
            self._begins, self._keys, self._values = self._begins[kept], self._keys[:, kept], self._values[:, kept]
        self.steps += 1

    def keep(self, layer: int, qkv: Tensor) -> None:
        """Keep the keys and values of the prompts, turned, ``[tokens, heads.all, width]``."""
        queries, keys = self._decoder.heads.queries, self._decoder.heads.keys
        for number, path in enumerate(self._shared.paths):
            rows, columns = qkv[path].transpose(0, 1), slice(self._columns - len(path), self._columns)
            self._keys[layer, number, :, columns] = rows[queries : queries + keys]
            self._values[layer, number, :, columns] = rows[queries + keys :]

    def extended(self, layer: int, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of one more token of each open answer; return all, ``[open, key heads, columns, width]``."""
        queries, keys = self._decoder.heads.queries, self._decoder.heads.keys
        last = self._columns - 1
        all_keys, all_values = self._keys[layer], self._values[layer]
        all_keys[:, :, last] = qkv[:, queries : queries + keys]
        all_values[:, :, last] = qkv[:, queries + keys :]
        return all_keys[:, :, : last + 1], all_values[:, :, : last + 1]

    @property
    def decoder(self) -> Decoder:
        """What computes the answers."""
        return self._decoder


class _Counter:
    """Counts the layers of a pass: its attentions are called in their order."""

    def __init__(self) -> None:
        self.number = -1

    def next(self) -> int:
        self.number += 1
        return self.number


class _Remembering:
    """Attention of the prompts, which keeps keys and values."""

    def __init__(
        self,
        answers: GrowingAnswers,
        layer: _Counter,
        setting: AttentionSetting,
        rotary: Rotary,
        packed: PackedSequence,
    ) -> None:
        decoder = answers.decoder
        self._answers, self._layer, self._rotary, self._heads = answers, layer, rotary, decoder.heads
        self._inner: Attention = decoder.operations.attention(packed, decoder.heads, rotary, setting.limits)

    def forward(self, qkv: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        turned = apply_rotary(qkv, self._heads, self._rotary)
        self._answers.keep(self._layer.next(), turned.view(len(qkv), self._heads.all, -1))
        return self._inner.forward(qkv, into)

    def backward(self, d_out: InputGradient, out: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError("answers have no gradient")


class _Reading:
    """Attention of one more token of each answer to all before it."""

    def __init__(
        self,
        answers: GrowingAnswers,
        layer: _Counter,
        setting: AttentionSetting,
        rotary: Rotary,
        begins: Tensor,
        columns: int,
    ) -> None:
        self._answers, self._layer, self._rotary = answers, layer, rotary
        self._heads, self._cap = answers.decoder.heads, setting.limits.cap
        keys = torch.arange(columns)
        hidden = keys < begins[:, None]
        if setting.limits.window is not None:
            hidden |= keys < columns - setting.limits.window
        self._mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]

    def forward(self, qkv: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        heads = self._heads
        turned = apply_rotary(qkv, heads, self._rotary).view(len(qkv), heads.all, heads.width)
        keys, values = self._answers.extended(self._layer.next(), turned)
        queries = turned[:, : heads.queries].reshape(len(qkv), heads.keys, -1, heads.width)
        scores = queries @ keys.transpose(2, 3)
        cap_scores(scores, self._cap)
        into.copy_((torch.softmax(scores.add_(self._mask), -1) @ values).reshape(len(qkv), -1))
        return ()

    def backward(self, d_out: InputGradient, out: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError("answers have no gradient")


def _rotary(setting: AttentionSetting, positions: Tensor) -> Rotary:
    return Rotary.of(positions, setting.frequencies, torch.float32, setting.scale, setting.rotary_factor)
