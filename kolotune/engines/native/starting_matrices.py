"""Adapters that start as a part of the base model's weights, which lose that part: PiSSA and OLoRA.

So the model starts as the base. What is saved is the change of the original weights, ``B A - B₀ A₀``: an ordinary
adapter of twice the rank. The part is computed from the base again when a training resumes.

Sources: Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
Models", 2024; Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024. The form that is
saved is the one that PEFT converts such adapters to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kolotune.weights.initial_matrices import Initial, starting_matrices

from .saved_modules import SavedModule
from .token_rows import NewTokenRows

_START = "start"  # the attribute of an adapter: A and B as they were


def start(adapter: Any, initial: Initial, weight: Tensor) -> Tensor:
    """Give an adapter its first matrices; return what is left of the weight, fp32.

    Args:
        adapter: with ``lora_A``, ``lora_B`` and ``scale``.
        initial: how it starts.
        weight: the base's, ``[out, in]``.
    """
    exact = weight.detach().float().cpu()
    a, b = (torch.from_numpy(each) for each in starting_matrices(initial, exact.numpy(), *_sizes(adapter)))
    with torch.no_grad():
        adapter.lora_A.copy_(a)
        adapter.lora_B.copy_(b)
    keep_start({"": adapter})
    return torch.addmm(exact, b, a, alpha=-adapter.scale).to(weight.device)


def _sizes(adapter: Any) -> tuple[int, float]:
    return len(adapter.lora_A), adapter.scale


def keep_start(adapters: Mapping[str, Any]) -> None:
    """Keep the adapters' current matrices as those that they started with."""
    for each in _matrices(adapters).values():
        setattr(each, _START, tuple(part.detach().to("cpu", copy=True) for part in (each.lora_A, each.lora_B)))


def as_base(flat: Tensor, adapters: Mapping[str, Any]) -> None:
    """Give all matrices values with which the model computes what its base does.

    Args:
        flat: the tensor that the adapters' are views of.
        adapters: all of them.
    """
    flat.zero_()
    for adapter in adapters.values():
        if isinstance(adapter, NewTokenRows):
            adapter.trainable_tokens_delta.copy_(adapter.start)
            continue
        if isinstance(adapter, SavedModule):
            for name, value in adapter.start.items():
                adapter.get_parameter(name).copy_(value)
            continue
        for part, value in zip((adapter.lora_A, adapter.lora_B), getattr(adapter, _START, ()), strict=False):
            part.copy_(value)


def added_to_base(tensors: Mapping[str, Tensor], adapters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return an adapter as an update of the original weights.

    Args:
        tensors: by PEFT's names, of adapters that all started as a part of the weights.
        adapters: these, by the names of their layers.
    """
    changed = dict(tensors)
    for name, each in _matrices(adapters).items():
        first_a, first_b = getattr(each, _START)
        a, b = (f"base_model.model.{name}.{part}.weight" for part in ("lora_A", "lora_B"))
        changed[a] = torch.cat([tensors[a], first_a])
        changed[b] = torch.cat([tensors[b], -first_b], dim=1)
    return changed


def _matrices(adapters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in adapters.items() if not isinstance(each, (NewTokenRows, SavedModule))}
