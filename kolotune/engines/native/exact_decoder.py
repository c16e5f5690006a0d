"""`engines.exact_model` by the decoder of the packed step, in fp32 on the CPU.

The adapter stands beside the frozen weights, so one copy of them serves the base and the tuned model, and answers of
both grow together: each step reads the weights once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.free_memory import return_free_memory

from . import llama
from .fused_linear import FusedLinear
from .growing_answers import GrowingAnswers
from .kernels import build
from .kernels.compiled_operations import CompiledOperations
from .lora import LoraPair
from .memory import LOGITS_AT_ONCE
from .operations import Operations, PlainOperations
from .shared_sequences import SharedSequences, group_sequences, share

if TYPE_CHECKING:
    from kolotune.weights.lora_delta import Delta

    from ..exact_model import Watch

_DTYPE = torch.float32


class _AdapterSwitch:
    """Which of the rows that are being computed have the adapter, and what is shown of them.

    Attributes:
        is_on: whether any row has it.
        plain: rows without it, bool ``[rows]``; None: none.
        watches: by the full names of linear layers.
        repeats: how often each row occurs, fp32 ``[rows, 1]``.
    """

    is_on = False
    plain: Tensor | None = None
    watches: Mapping[str, Watch]
    repeats: Tensor

    def __init__(self) -> None:
        self.watches = {}

    def turn(self, adapted: Sequence[bool]) -> None:
        """Give the adapter to some rows."""
        self.is_on = any(adapted)
        self.plain = None if all(adapted) else ~torch.tensor(adapted)


class _SwitchedLinear(FusedLinear):
    """Linear layers whose adapters some rows do not have."""

    switch: _AdapterSwitch
    names: dict[int, str]

    def take_adapters(self) -> None:
        """Take over the values of the adapters, which no training changes."""
        for pair, rows, columns in self.parts:
            torch.mul(pair.lora_A.detach(), pair.scale, out=self.down[columns])
            added = slice(self.inputs + columns.start, self.inputs + columns.stop)
            self._product.replace(rows, added, pair.lora_B.detach())

    def forward(self, x: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        assert kept is None
        inputs, low = x[:, : self.inputs], x[:, self.inputs :]
        if self.switch.is_on and self.rank:
            self._operations.lower(inputs, self.down, low)
            if self.switch.plain is not None:
                low[self.switch.plain] = 0
        out = self._product.forward(x, self.bias)
        for pair, rows, _ in self.parts if self.switch.watches else ():
            watch = self.switch.watches.get(self.names[id(pair)])
            if watch is not None:
                outputs = out[:, rows] if self.bias is None else out[:, rows] - self.bias[rows]
                watch(inputs, outputs, self.switch.repeats)
        return out


class PackedExactModel:
    """See `engines.exact_model.ExactModel`.

    Args:
        folder: a model that `exact_support` supports.
        adapter: what it adds, by the names of weights.
    """

    def __init__(self, folder: Path, adapter: Mapping[str, Delta]) -> None:
        pairs: dict[str, LoraPair] = {}

        def pair(name: str, outputs: int, inputs: int) -> LoraPair | None:
            delta = adapter.get(f"{name}.weight")
            if delta is None:
                return None
            if (outputs, inputs) != (len(delta.b), delta.a.shape[1]):
                raise ArtifactError(f"the adapter adds {delta.shape} to {name}, which is {(outputs, inputs)}")
            adapted = LoraPair(inputs, outputs, len(delta.a), delta.scale, 0.0)
            adapted.lora_A, adapted.lora_B = (nn.Parameter(torch.tensor(each), False) for each in (delta.a, delta.b))
            pairs[name] = adapted
            return adapted

        self._switch = _AdapterSwitch()
        self._decoder = llama.load_decoder(folder, _operations(), _DTYPE, pair, _SwitchedLinear)
        names = {id(adapted): name for name, adapted in pairs.items()}
        for layer in self._decoder.layers:
            for linear in layer.linears:
                assert isinstance(linear, _SwitchedLinear)
                linear.switch, linear.names = self._switch, names
                linear.take_adapters()
        return_free_memory()  # of the copies that were read
        if unknown := sorted(set(adapter) - {f"{name}.weight" for name in pairs}):
            raise ArtifactError(f"the adapter changes {unknown[0]}, which the base model does not have")

    def logits(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], adapted: bool
    ) -> Iterator[tuple[int, Tensor]]:
        for group in group_sequences(sequences):
            shared = share([sequences[number] for number in group])
            states = self._states(shared, adapted)
            for number, path in zip(group, shared.paths, strict=True):
                yield number, self._decoder.logits(states[path[list(positions[number])]])

    @torch.no_grad()
    def losses(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], adapted: bool
    ) -> list[Tensor]:
        losses: dict[int, Tensor] = {}
        for group in group_sequences(sequences):
            shared = share([sequences[number] for number in group])
            states = self._states(shared, adapted)
            rows = torch.cat([path[list(positions[at])] for at, path in zip(group, shared.paths, strict=True)])
            targets = torch.tensor([sequences[at][position + 1] for at in group for position in positions[at]])
            parts = [
                self._decoder.operations.cross_entropy(
                    self._decoder.head.forward(states[some], None), wanted, 0.0, self._decoder.factors.logits
                )[0]
                for some, wanted in zip(*(torch.split(each, LOGITS_AT_ONCE) for each in (rows, targets)), strict=True)
            ]
            counts = [len(positions[number]) for number in group]
            losses |= dict(zip(group, torch.split(torch.cat(parts), counts), strict=True))
        return [losses[number] for number in range(len(sequences))]

    @torch.no_grad()
    def answers(
        self, prompts: Sequence[Sequence[int]], adapted: Sequence[bool], end: int, longest: int
    ) -> list[list[int]]:
        if not prompts:
            return []
        growing = GrowingAnswers(self._decoder, prompts, end)
        self._switch.turn([each for prompt, each in zip(prompts, adapted, strict=True) for _ in prompt])
        growing.read_prompts()
        while growing.open and growing.steps < longest:
            self._switch.turn([adapted[number] for number in growing.open])
            growing.step()
        return growing.answers

    def watch(self, watches: Mapping[str, Watch]) -> None:
        self._switch.watches = watches

    def _states(self, shared: SharedSequences, adapted: bool) -> Tensor:
        self._switch.turn([adapted])
        self._switch.repeats = shared.repeats
        return self._decoder.states(shared.packed)


def _operations() -> Operations:
    """Return the compiled kernels where a training has compiled them; to compile them takes longer than it saves."""
    library = build.compiled("fp32")
    return CompiledOperations(library, _DTYPE) if library is not None else PlainOperations()
