"""AdamW on the adapters, with a higher learning rate for B than for A where that is asked for (LoRA+).

Source: Hayou, Ghosh, Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .lora import A, FlatAdapters, Trained, parts_of
from .saved_modules import BIAS, WEIGHT
from .token_rows import ROWS

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # torch.optim's
_RATE_OF_A = (A, ROWS, WEIGHT, BIAS)


class FusedAdamW:
    """AdamW by PyTorch's fused operation, step by step as `torch.optim.AdamW` makes it with ``fused=True``.

    The first optimizer of torch.optim loads PyTorch's compiler, which takes two seconds and 70 MB.

    Args:
        groups: of parameters, each a dictionary with ``params``, and ``weight_decay`` where it is another one.
        weight_decay: of all others.

    Attributes:
        param_groups: the groups, with ``lr``, the learning rate, which is set before each step.
        state: ``step``, ``exp_avg`` and ``exp_avg_sq`` of each parameter that has been changed.
    """

    def __init__(self, groups: Sequence[Mapping[str, object]], weight_decay: float) -> None:
        self.param_groups: list[dict[str, Any]] = [{"weight_decay": weight_decay, **group} for group in groups]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters that have gradients."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [self.state.get(parameter) or self._first(parameter) for parameter in parameters]
            means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                parameters, [parameter.grad for parameter in parameters], means, squares, [], steps, lr=group["lr"],
                beta1=_BETAS[0], beta2=_BETAS[1], weight_decay=group["weight_decay"], eps=_EPSILON, amsgrad=False,
                maximize=False,
            )  # fmt: skip

    def _first(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        self.state[parameter] = {"step": torch.zeros(()), **zeros}
        return self.state[parameter]


class AdapterOptimizer:
    """The optimizer, and its state as a checkpoint stores it.

    Magnitudes (DoRA) have the rate of B, as with PEFT's LoRA+. With one rate for all, AdamW is one operation on the
    flat tensor; with several, one on each matrix, which is a view of it. A checkpoint has the same tensors either way.

    Args:
        adapters: all of them.
        flat: their matrices as one tensor.
        weight_decay: of all of them.
        ratio: B's learning rate, divided by A's.
        fused: whether to use PyTorch's fused step.
    """

    def __init__(
        self,
        adapters: Mapping[str, Trained],
        flat: FlatAdapters,
        weight_decay: float,
        ratio: float,
        fused: bool,
    ) -> None:
        self._flat = flat
        self._parameters: dict[str, nn.Parameter] = {"": flat.parameter}
        groups: list[dict[str, object]] = [{"params": [flat.parameter], "ratio": 1.0}]
        named = {
            (name, part): getattr(adapter, part) for name, adapter in adapters.items() for part in parts_of(adapter)
        }
        # Norms and biases that are trained whole do not shrink.
        fixed = [tensor for (_, part), tensor in named.items() if part in (WEIGHT, BIAS) and tensor.ndim == 1]
        if ratio != 1 or fixed:
            self._parameters = {f"{name}.{part}": tensor for (name, part), tensor in named.items()}
            rest = [(part in _RATE_OF_A, tensor) for (_, part), tensor in named.items()]
            kept = {id(tensor) for tensor in fixed}
            groups = [
                {
                    "params": [
                        each for has_rate_of_a, each in rest if has_rate_of_a is is_first and id(each) not in kept
                    ],
                    "ratio": factor,
                }
                for is_first, factor in ((True, 1.0), (False, ratio))
            ]
            groups += [{"params": fixed, "ratio": 1.0, "weight_decay": 0.0}] if fixed else []
        self._adamw = (FusedAdamW if fused else torch.optim.AdamW)(groups, weight_decay=weight_decay)

    def zero_grad(self) -> None:
        """Set all gradients to 0, in place."""
        assert self._flat.parameter.grad is not None
        self._flat.parameter.grad.zero_()

    def step(self, rate: float) -> None:
        """Change the adapters by their gradients; `rate` is the learning rate of A."""
        for group in self._adamw.param_groups:
            group["lr"] = rate * group["ratio"]
        self._adamw.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state: ``step.``, and ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` for each matrix; or {}."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for key, value in self._adamw.state.get(parameter, {}).items():
                parts = {"": value} if key == "step" else self._named(name, value)
                state |= {f"{key}.{part}": each for part, each in parts.items()}
        return state

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        if "step." not in tensors:
            return
        for name, parameter in self._parameters.items():
            state = {"step": tensors["step."].clone()}
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter)
                for part, each in self._named(name, state[key]).items():
                    each.copy_(tensors[f"{key}.{part}"])
            self._adamw.state[parameter] = state

    def _named(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Return the parts of a tensor that is laid out like the parameter `name`, by matrix."""
        return {name: value} if name else self._flat.named(value)
