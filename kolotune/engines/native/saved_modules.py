"""Modules whose weights are trained whole beside the adapters and saved with them: PEFT's ``modules_to_save``.

Embedding, head and norms are what this is for. The weights are fp32 whatever the module's dtype, as adapters are; in
each step the module computes with a copy in its own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from kolotune.foundation.errors import ConfigError

WEIGHT, BIAS = "weight", "bias"
"""The trained tensors, as attributes and in PEFT's files."""
_ADAPTED = "lora_A"  # of a layer with an adapter


class SavedModule(nn.Module):
    """A module with trained weights.

    Args:
        base: the module, whose own weights are given up.
        weights: those to train, by name; None for copies of the module's own.

    Attributes:
        parts: names of the trained tensors.
        start: their first values, on the CPU.
    """

    def __init__(self, base: nn.Module, weights: dict[str, nn.Parameter] | None = None) -> None:
        super().__init__()
        own = dict(base.named_parameters(recurse=False))
        self._dtype = own[WEIGHT].dtype
        trained = weights or {name: nn.Parameter(weight.detach().float().clone()) for name, weight in own.items()}
        self.parts = tuple(trained)
        self.start = {name: weight.detach().to("cpu", copy=True) for name, weight in trained.items()}
        for name, weight in trained.items():
            setattr(self, name, weight)
            setattr(base, name, nn.Parameter(own[name].new_empty(0), requires_grad=False))
        self.base = base

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that the module itself has, such as its size, for code of models that asks for it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Return what the module computes with the trained weights."""
        weights = {name: getattr(self, name).to(self._dtype) for name in self.parts}
        output: Tensor = functional_call(self.base, weights, arguments, named)
        return output


def train_whole(model: Any, named: Sequence[str]) -> dict[str, SavedModule]:
    """Have modules of a frozen model train whole; return them by their full names, in the model's order.

    Embedding and head that are tied stay so: either name stands for both, and the embedding is returned.

    Args:
        model: a causal language model of transformers, with its adapters.
        named: last parts of the modules' names; [] for none.

    Raises:
        ConfigError: there is no such module, it has an adapter, or it has no weight of its own.
    """
    if not named:
        return {}
    paths = {module: path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    chosen = {path: module for module, path in paths.items() if path.rpartition(".")[2] in named}
    missing = sorted(set(named) - {path.rpartition(".")[2] for path in chosen})
    if missing:
        raise ConfigError(f"modules-to-save: the model has no module {', '.join(missing)}", "Name another module.")
    is_tied = head is not None and head.weight is embedding.weight
    if is_tied and (embedding in chosen.values() or head in chosen.values()):
        chosen.pop(paths[head], None)
        chosen = {paths[embedding]: embedding, **chosen}
    saved = {}
    for path, module in chosen.items():
        if hasattr(module, _ADAPTED) or not isinstance(getattr(module, WEIGHT, None), nn.Parameter):
            reason = "it has an adapter" if hasattr(module, _ADAPTED) else "it has no weight of its own"
            raise ConfigError(f"modules-to-save: {path} can't be trained whole: {reason}", "Name another module.")
        saved[path] = SavedModule(module)
        _replace(model, path, saved[path])
        if is_tied and module is embedding:
            _replace(model, paths[head], SavedModule(head, {WEIGHT: saved[path].get_parameter(WEIGHT)}))
    return saved


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def peft_names(model: nn.Module, trained: Mapping[str, object]) -> list[str]:
    """Return names by which PEFT finds the saved modules and no others: it takes each module whose name ends so.

    Args:
        model: the model.
        trained: all that is trained, by full names.
    """
    saved = [path for path, entry in trained.items() if isinstance(entry, SavedModule)]
    names: list[str] = []
    for leaf in dict.fromkeys(path.rpartition(".")[2] for path in saved):
        meant = [path for path in saved if path.rpartition(".")[2] == leaf]
        found = {path for path, _ in model.named_modules() if path.endswith(leaf)}
        names += [leaf] if found == set(meant) else meant
    return names


def tied_ends(model: Any) -> tuple[str, str] | None:
    """Return the full names of embedding and head if both are trained whole, as one; None otherwise."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not all(isinstance(end, SavedModule) for end in ends) or ends[0].weight is not ends[1].weight:
        return None
    paths = {module: path for path, module in model.named_modules()}
    return paths[ends[0]], paths[ends[1]]
