"""Layers' inputs in the host's memory: the same step, whatever the order in which copies are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packed_models import chats_of, gradients, pair_of

from kolotune.engines.memory import BatchShape
from kolotune.engines.native import memory
from kolotune.engines.native import model as models
from kolotune.engines.native.device_operations import DeviceOperations
from kolotune.engines.native.offloading import HostInputs
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.weights.model_shape import AdapterShape, read_shape

MakeTraining = Callable[..., Any]


@dataclass
class _LateStream:
    """Makes each copy as late as a GPU may: when the computation waits for it, or for one that was enqueued later."""

    waiting: list[tuple[int, Callable[[], object]]] = field(default_factory=list)
    enqueued: int = 0

    def enqueue(self, copy: Callable[[], object]) -> object:
        self.enqueued += 1
        self.waiting.append((self.enqueued, copy))
        return self.enqueued

    def wait(self, enqueued: Any) -> None:
        while self.waiting and self.waiting[0][0] <= enqueued:
            self.waiting.pop(0)[1]()


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("stream", [None, _LateStream])
def test_a_step_is_the_same_to_the_bit(
    layers: int, stream: Any, make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_training("llama", chats=chats_of(3, 5, 9, 30), num_hidden_layers=layers).job(lora_dropout=0.1)
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    streams = []

    def host_inputs(device: torch.device) -> HostInputs:
        streams.append(stream and stream())
        return HostInputs(device, streams[-1])

    monkeypatch.setattr(models, "HostInputs", host_inputs)
    results = []
    for offload in (False, True):
        model, _ = pair_of(job, DeviceOperations())
        model._recomputes = lambda packed: True  # type: ignore[method-assign]
        model._offloads = lambda packed, wanted=offload: wanted  # type: ignore[method-assign, misc]
        torch.manual_seed(9)
        results.append(gradients(model, tokens, range(len(tokens)), 0.1))
    assert streams, "the host kept them"
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
    for late in streams:
        assert late is None or (not late.waiting and late.enqueued == 2 * layers), "each goes and comes once"


def test_few_inputs_are_on_the_device_together() -> None:
    stream = _LateStream()
    inputs = HostInputs(torch.device("cpu"), stream)
    for index in range(6):
        inputs.store(index, torch.full((2, 3), float(index)))
        assert len(inputs._leaving) < memory.INPUTS_IN_FLIGHT
    for index in reversed(range(6)):
        assert torch.equal(inputs.fetch(index), torch.full((2, 3), float(index)))
        assert len(inputs._leaving) + len(inputs._coming) < memory.INPUTS_IN_FLIGHT
    assert not inputs._host and not inputs._coming


def test_the_formulas_offload_what_does_not_fit_recomputed(make_training: MakeTraining) -> None:
    shape = read_shape(make_training(num_hidden_layers=9).root / "base")
    adapter, batch = AdapterShape.of(shape, 4, ["all-linear"]), BatchShape(512, 1, 512, 0, 8, padded=False)
    step = (shape, adapter, batch, 2)
    recomputed = memory._packed_step_bytes(*step, True, False)
    offloaded = memory._packed_step_bytes(*step, True, False, True)
    inputs = 512 * 64 * 2
    assert recomputed - offloaded == (9 - memory.INPUTS_IN_FLIGHT) * inputs
    gpu, recomputes = memory.packed_on_gpu(*step, 1 << 40, in_4bit=False)
    assert not recomputes and not gpu.offloaded
    resident = gpu.needed - memory._packed_step_bytes(*step, False, False)
    gpu, recomputes = memory.packed_on_gpu(*step, resident + recomputed, in_4bit=False)
    assert recomputes and gpu.offloaded == 9 * inputs, "a tenth of the memory is left for fragments"
    assert gpu.needed == resident + offloaded
