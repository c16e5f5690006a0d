"""Moving tensors to a device, and numbers back from it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; the host does not wait for the copy to a GPU of NVIDIA's or AMD's."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which losses are added up: fp64, which Apple's GPUs don't have."""
    return torch.float32 if device.type == "mps" else torch.float64


def random_state(device: torch.device) -> Tensor:
    """Return the state of a device's random generator, on the host."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Restore what `random_state` returned."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)
