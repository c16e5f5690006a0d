"""LoRA on the experts of a layer, whose weights transformers keeps in one parameter for all of them.

Each expert has an A and a B of its own, as PEFT's ``target_parameters`` have. Tokens are sorted by their experts, and
each expert computes its own: the frozen weight and the two thin products beside it. The products of A and B, which are
as large as the experts, are never computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kolotune.foundation.errors import ConfigError
from kolotune.weights.composite_models import language_module

from .lora_settings import LoraSettings

ALL_EXPERTS = "all-experts"
_MARKS = ("is_transposed", "has_gate", "has_bias", "has_post_expert_norm", "_apply_gate")
"""What transformers sets on every class of experts whose computation follows its one form."""


class LoraExpertWeight(nn.Module):
    """The low-rank updates of one weight of all experts.

    They are fp32, as those of `lora.LoraLinear`.

    Args:
        weight: the frozen weight, ``[experts, out, in]``, or ``[experts, in, out]`` if `transposed`.
        target: its name for PEFT's ``target_parameters``.
        transposed: see `weight`.
        rank, scale, dropout: see `lora.LoraLinear`.

    Attributes:
        lora_A: ``[experts, rank, in]``, initially random.
        lora_B: ``[experts, out, rank]``, initially zero.
        target: see the arguments.
    """

    def __init__(self, weight: Tensor, target: str, transposed: bool, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        experts, outputs, inputs = weight.transpose(1, 2).shape if transposed else weight.shape
        device = torch.device("cpu") if weight.is_meta else weight.device
        self.lora_A = nn.Parameter(torch.empty(experts, rank, inputs, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(experts, outputs, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A.data.view(-1, inputs), a=math.sqrt(5))
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.target = target

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """``[tokens, in] → [tokens, out]`` in x's dtype: what the update of an expert adds, not yet scaled."""
        low = nn.functional.linear(self.dropout(x), self.lora_A[expert].to(x.dtype))
        return nn.functional.linear(low, self.lora_B[expert].to(x.dtype))


class LoraExperts(nn.Module):
    """The frozen experts of a layer, with low-rank updates of their weights.

    Args:
        base: the experts, in the form that `can_adapt` asks for.
        updates: by the names of the weights.
    """

    def __init__(self, base: nn.Module, updates: Mapping[str, LoraExpertWeight]) -> None:
        super().__init__()
        self.base: Any = base
        self.updates = nn.ModuleDict(dict(updates))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, hidden] → [tokens, hidden]``: the sum of the chosen experts, weighted by the router.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: int64 ``[tokens, chosen]``: experts of each token.
            top_k_weights: ``[tokens, chosen]``: their weights.
        """
        chosen = top_k_index.shape[-1]
        experts = top_k_index.reshape(-1)
        order = torch.argsort(experts, stable=True)
        counts = torch.bincount(experts, minlength=len(getattr(self.base, "down_proj"))).tolist()  # noqa: B009
        sorted_tokens = torch.split(hidden_states[order // chosen], counts)
        outputs = [self._expert(expert, tokens) for expert, tokens in enumerate(sorted_tokens) if len(tokens)]
        unsorted = torch.cat(outputs)[torch.argsort(order)]
        weighted = unsorted * top_k_weights.reshape(-1, 1)
        return weighted.view(-1, chosen, weighted.shape[-1]).sum(dim=1).to(hidden_states.dtype)

    def _expert(self, expert: int, tokens: Tensor) -> Tensor:
        base = self.base
        if base.has_gate:
            hidden = base._apply_gate(self._project("gate_up_proj", expert, tokens))
        else:
            hidden = base.act_fn(self._project("up_proj", expert, tokens))
        output = self._project("down_proj", expert, hidden)
        if base.has_post_expert_norm:
            output = base.post_expert_norm(output)
        return output

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self.base, name)[expert]
        bias = getattr(self.base, f"{name}_bias")[expert] if self.base.has_bias else None
        projected = nn.functional.linear(x, weight.T if self.base.is_transposed else weight, bias)
        if name not in self.updates:
            return projected
        update: Any = self.updates[name]
        return torch.add(projected, update(x, expert), alpha=update.scale)


def weights_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights that can get an update, in the module's order; () if it is no such experts."""
    if any(not hasattr(module, mark) for mark in _MARKS):
        return ()
    parameters = dict(module.named_parameters(recurse=False))
    names = ("gate_up_proj" if getattr(module, "has_gate") else "up_proj", "down_proj")  # noqa: B009
    weights = [parameters.get(name) for name in names]
    fits = all(weight is not None and weight.ndim == 3 and weight.is_floating_point() for weight in weights)
    return names if fits else ()


def add_expert_adapters(
    model: nn.Module, settings: LoraSettings, targets: Sequence[str]
) -> dict[str, LoraExpertWeight]:
    """Put adapters beside the targeted weights of all experts of a frozen model.

    Args:
        model: a causal language model of transformers.
        settings: of the adapters.
        targets: ends of the names of weights, such as ``experts.down_proj``; or ``all-experts``; [] for none.

    Returns:
        The adapters by the names under which PEFT saves them: a module with two of them is wrapped twice, the weight
        declared first inside.

    Raises:
        ConfigError: a target is no weight of experts.
    """
    prefix, language = language_module(model)
    modules = {
        ".".join(filter(None, (prefix, name))): module
        for name, module in language.named_modules()
        if targets and weights_of(module)
    }
    check_targets(targets, {f"{name}.{weight}" for name, module in modules.items() for weight in weights_of(module)})
    adapters: dict[str, LoraExpertWeight] = {}
    for name, module in modules.items():
        weights = {weight: getattr(module, weight) for weight in weights_of(module)}
        is_transposed = bool(getattr(module, "is_transposed"))  # noqa: B009
        updates = new_updates(name, weights, settings, targets, is_transposed=is_transposed)
        adapters |= named_as_saved(name, updates)
        if updates:
            model.set_submodule(name, LoraExperts(module, updates))
    return adapters


def new_updates(
    name: str,
    weights: Mapping[str, Tensor],
    settings: LoraSettings,
    targets: Sequence[str],
    *,
    is_transposed: bool = False,
) -> dict[str, LoraExpertWeight]:
    """Return new adapters for the targeted weights of the experts of a layer, by the names of the weights.

    Args:
        name: of the experts' module.
        weights: by name.
        settings: of the adapters.
        targets: see `add_expert_adapters`.
        is_transposed: see `LoraExpertWeight`.
    """
    return {
        leaf: LoraExpertWeight(
            weight,
            ".".join([*name.split("."), leaf][-3:]),
            is_transposed,
            settings.rank_of(f"{name}.{leaf}"),
            settings.scale_of(f"{name}.{leaf}"),
            settings.dropout,
        )
        for leaf, weight in weights.items()
        if any(target == ALL_EXPERTS or _is_end(target, f"{name}.{leaf}") for target in targets)
    }


def named_as_saved(name: str, updates: Mapping[str, LoraExpertWeight]) -> dict[str, LoraExpertWeight]:
    """Return the adapters of a module's experts by the names under which PEFT saves them."""
    return {name + depth * ".base_layer": update for depth, update in enumerate(reversed(list(updates.values())))}


def check_targets(targets: Sequence[str], weights: Collection[str]) -> None:
    """Check that each target is the end of the name of a weight.

    Raises:
        ConfigError: one is not.
    """
    unknown = [name for name in targets if name != ALL_EXPERTS and not any(_is_end(name, known) for known in weights)]
    if unknown:
        endings = sorted({".".join(name.split(".")[-2:]) for name in weights})
        raise ConfigError(
            f"target-parameters: this model has no experts' weight {', '.join(unknown)}",
            f"Its experts' weights are: {', '.join(endings)}." if endings else "Leave out --target-parameters.",
        )


def among(adapters: Mapping[str, object]) -> dict[str, LoraExpertWeight]:
    """Return the adapters of experts among the adapters, by name."""
    return {name: each for name, each in adapters.items() if isinstance(each, LoraExpertWeight)}


def target_parameters(adapters: Mapping[str, object]) -> list[str]:
    """Return the weights of experts among the adapters, as PEFT's ``target_parameters`` name them."""
    return sorted({each.target for each in adapters.values() if isinstance(each, LoraExpertWeight)})


def _is_end(end: str, name: str) -> bool:
    return name == end or name.endswith(f".{end}")
