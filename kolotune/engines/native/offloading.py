"""The inputs of layers in the host's memory, where those of a step that recomputes do not fit on the GPU either.

A stream of its own copies each input to pinned memory while the next layers are computed. In the backward pass the
copy back begins one layer ahead. The host only enqueues: what has to wait is the device's stream of computation. An
input is let go once that stream waits for its copy, so that its memory is not used too early, nor kept for longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .memory import INPUTS_IN_FLIGHT


class CopyStream(Protocol):
    """Where copies are enqueued, beside the computation."""

    def enqueue(self, copy: Callable[[], object]) -> object:
        """Enqueue a copy behind what the computation has enqueued so far; return what `wait` takes."""

    def wait(self, enqueued: object) -> None:
        """Let the computation wait for a copy; the host does not."""


class CudaCopyStream:
    """A stream of a GPU. It was never run on one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def enqueue(self, copy: Callable[[], object]) -> object:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
        return self._stream.record_event()

    def wait(self, enqueued: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(enqueued)


class _NoStream:
    """Copies at once."""

    def enqueue(self, copy: Callable[[], object]) -> object:
        return copy()

    def wait(self, enqueued: object) -> None:
        pass


class HostInputs:
    """The inputs of a step's layers, by the layers' indices.

    Args:
        device: of the inputs.
        stream: copies them; None for what the device has.
    """

    def __init__(self, device: torch.device, stream: CopyStream | None = None) -> None:
        self._is_pinned = device.type == "cuda"
        self._stream = stream or (CudaCopyStream(device) if self._is_pinned else _NoStream())
        self._device = device
        self._host: dict[int, Tensor] = {}
        self._leaving: list[tuple[object, Tensor]] = []
        self._coming: dict[int, tuple[object, Tensor]] = {}

    def store(self, index: int, x: Tensor) -> None:
        """Copy an input to the host; its memory must not change until two more are stored, or one is fetched."""
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._is_pinned)
        self._host[index] = host
        self._leaving.append((self._stream.enqueue(lambda: host.copy_(x, non_blocking=True)), x))
        self._let_go(INPUTS_IN_FLIGHT - 1)

    def fetch(self, index: int) -> Tensor:
        """Return an input on the device, and begin to copy the one in front of it, which is fetched next."""
        self._let_go(0)
        self._begin(index)
        enqueued, x = self._coming.pop(index)
        self._stream.wait(enqueued)
        del self._host[index]
        self._begin(index - 1)
        return x

    def _begin(self, index: int) -> None:
        if index in self._host and index not in self._coming:
            host = self._host[index]
            x = torch.empty(host.shape, dtype=host.dtype, device=self._device)
            self._coming[index] = self._stream.enqueue(lambda: x.copy_(host, non_blocking=True)), x

    def _let_go(self, kept: int) -> None:
        """Let the computation wait for all copies to the host but the last `kept`, and free their inputs."""
        while len(self._leaving) > kept:
            self._stream.wait(self._leaving.pop(0)[0])
