"""An adapter's ``adapter_config.json``, in PEFT's format: read and checked."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, ModelError
from kolotune.foundation.name_patterns import by_pattern, is_heavy
from kolotune.foundation.typed_storage import JsonObject

from .adapter_folder import FILE, no_adapter
from .adapter_kinds import METHODS, initial_matrices, other_task, refused_initialisation, refused_variant
from .initial_matrices import Initial

_COPY_AGAIN = "Copy the adapter again."


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter that a merge depends on.

    Attributes:
        rank, alpha: of all modules but those that a pattern names; `alpha` None stands for the module's rank.
        rank_patterns, alpha_patterns: exceptions, by regular expressions for the end of a module's name.
        rank_stabilised: whether the scale is alpha / sqrt(rank) (Kalajdzievski, 2023).
        transposed: whether the weights are stored ``[in, out]``.
        has_magnitudes: whether rows are scaled to a trained length (DoRA; Liu et al., 2024).
        ties_weights: whether embedding and head stay tied although the adapter changes one of them.
        base_name: the base model's name; "" when the file does not say.
        initial: what the update started as, and the base model's weights were reduced by; None: they were not.
        saved_modules: ends of the names of modules that were trained whole.
        target_modules: names, or ends of names, of the modules that have an update; or a regular expression.
        target_parameters: the same for parameters, whose modules have several or have no ``weight``.
        token_indices: the tokens whose rows were trained, by the end of the embedding's name; "" stands for any.
    """

    rank: int
    alpha: float | None = None
    rank_patterns: Mapping[str, float] = field(default_factory=dict)
    alpha_patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    transposed: bool = False
    has_magnitudes: bool = False
    ties_weights: bool = False
    base_name: str = ""
    initial: Initial | None = None
    saved_modules: tuple[str, ...] = ()
    target_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """Return the rank that the config gives for a module or parameter."""
        return int(by_pattern(self.rank_patterns, module, self.rank))

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of a module's product.

        Raises:
            ArtifactError: the module's weights have another rank than the config says.
        """
        configured = self.rank_of(module)
        if configured != rank:
            raise ArtifactError(f"{module}: its rank is {rank}, the config says {configured}", _COPY_AGAIN)
        alpha = float(by_pattern(self.alpha_patterns, module, rank if self.alpha is None else self.alpha))
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """Return the tokens whose rows of an embedding were trained."""
        return next((tokens for name, tokens in self.token_indices.items() if not name or _ends(module, (name,))), ())

    def parameters_of(self, module: str, count: int) -> list[str]:
        """Return the names of the parameters of a module that have updates of their own, the outermost first.

        PEFT wraps a module once for each of its parameters, in the order in which the module declares them; [] for a
        module whose weight has the update.

        Args:
            module: its name.
            count: how many updates it has. A target without a module's name may be a parameter of any module.
        """
        if not self.target_parameters or self._is_target_module(module):
            return []
        targets = [target for target in self.target_parameters if _parameter(target, module)]
        named = {_parameter(target, module) for target in targets if "." in target}
        leaves = named if len(named) == count else {_parameter(target, module) for target in targets}
        order = [*_DECLARED, *sorted(leaves - set(_DECLARED))]
        return [f"{module}.{leaf}" for leaf in sorted(leaves, key=order.index, reverse=True)]

    def _is_target_module(self, module: str) -> bool:
        if not isinstance(self.target_modules, str):
            return _ends(module, self.target_modules)
        return not is_heavy(self.target_modules) and re.fullmatch(self.target_modules, module) is not None


_DECLARED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""Parameters of a module with all experts of a layer, in the order in which transformers declares them."""


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _parameter(target: str, module: str) -> str:
    """Return the parameter of a module that one of PEFT's ``target_parameters`` means; "" for another module."""
    owner, _, leaf = target.rpartition(".")
    return leaf if not owner or _ends(module, (owner,)) else ""


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read an adapter's config.

    Raises:
        ModelError: there is none, or it is not of an adapter that can be merged exactly.
        ArtifactError: it is damaged.
    """
    path = folder / FILE
    try:
        values = typed_storage.read_object(path)
    except OSError:
        raise no_adapter(folder) from None
    except typed_storage.StorageError as error:
        raise ArtifactError(f"{path}: can't be read: {error}", _COPY_AGAIN) from None
    _check_mergeable(path, values)
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise ArtifactError(f"{path}: r is not a rank", _COPY_AGAIN)
    if "lora_alpha" in values and not _is_number(alpha):
        raise ArtifactError(f"{path}: lora_alpha is not a number", _COPY_AGAIN)
    return AdapterConfig(
        rank,
        alpha if _is_number(alpha) else None,
        _patterns(path, "rank_pattern", values.get("rank_pattern") or {}),
        _patterns(path, "alpha_pattern", values.get("alpha_pattern") or {}),
        rank_stabilised=bool(values.get("use_rslora")),
        transposed=bool(values.get("fan_in_fan_out")),
        has_magnitudes=bool(values.get("use_dora")),
        ties_weights=bool(values.get("ensure_weight_tying")),
        base_name=str(values.get("base_model_name_or_path") or ""),
        initial=initial_matrices(values.get("init_lora_weights")),
        saved_modules=_names(path, "modules_to_save", values.get("modules_to_save")),
        target_modules=_targets(path, values.get("target_modules")),
        target_parameters=_names(path, "target_parameters", values.get("target_parameters")),
        token_indices=_token_indices(path, values.get("trainable_token_indices")),
    )


def _names(path: Path, option: str, value: object) -> tuple[str, ...]:
    names = value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"{path}: {option} is not a list of names", _COPY_AGAIN)
    return tuple(names)


def _targets(path: Path, value: object) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else _names(path, "target_modules", value)


def _token_indices(path: Path, value: object) -> dict[str, tuple[int, ...]]:
    indices: dict[str, tuple[int, ...]] = {}
    for name, tokens in (value if isinstance(value, dict) else {"": value or []}).items():
        if not isinstance(tokens, list) or not all(isinstance(token, int) and 0 <= token < 1 << 31 for token in tokens):
            raise ArtifactError(f"{path}: trainable_token_indices can't be read", _COPY_AGAIN)
        indices[name] = tuple(tokens)
    return indices


def _check_mergeable(path: Path, values: JsonObject) -> None:
    """Check that the config is of a LoRA adapter whose change of the base model is known.

    Raises:
        ModelError: it is not; the method is named.
    """
    method = str(values.get("peft_type") or "")
    if method != "LORA":
        if method in METHODS:
            raise ModelError(f"{path}: is made with {METHODS[method].name}", METHODS[method].instead.value)
        known = f"of the unknown kind {method[:40]!r}" if method else "not in PEFT's format (it has no peft_type)"
        raise ModelError(f"{path}: the adapter is {known}", "Only LoRA adapters can be merged.")
    task = other_task(values)
    if task:
        raise ModelError(f"{path}: is an adapter of {task} ({values['task_type']})", "Only models that write text fit.")
    refusal = refused_variant(values)
    if refusal is not None:
        raise ModelError(f"{path}: is made with {refusal.name}", refusal.instead.value)
    refusal = refused_initialisation(values.get("init_lora_weights", True))
    if refusal is not None:
        cause = f"{path}: starts with {refusal.name}, which changed the base model's weights before training"
        raise ModelError(cause, refusal.instead.value)


def _patterns(path: Path, option: str, value: object) -> dict[str, float]:
    """Check patterns: they are code of whoever made the adapter, so only short ones without nested repetition pass."""
    patterns: dict[str, float] = {}
    for pattern, number in value.items() if isinstance(value, dict) else [("", None)]:
        if is_heavy(pattern) or not _is_number(number):
            raise ArtifactError(f"{path}: {option} can't be read", _COPY_AGAIN)
        patterns[pattern] = number
    return patterns


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold: JSON allows longer ones, and Python reads NaN too."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
