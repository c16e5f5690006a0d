"""Writes the trained adapter in PEFT's format, the same for every engine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.files import replacing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdapterContent:
    """What an adapter folder has: the trained tensors, and what says how they are used.

    Attributes:
        tensors: A, B and magnitudes under PEFT's names and in its form, fp32, on the CPU.
        base_name: the base model's name in the config.
        rank, alpha, dropout: of the training.
        ranks, alphas: exceptions, by patterns of the modules' names.
        rank_stabilised: whether the scale is ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        has_magnitudes: whether ``lora_magnitude_vector`` is among the tensors (DoRA).
        parameters: PEFT's ``target_parameters``: the weights with updates of their own that are no module's only one.
        new_tokens: ids of the tokens whose rows are among the tensors.
        modules_to_save: ends of the names of modules that were trained whole and are among the tensors.
        tied_ends: names of embedding and head, if the embedding is among these and stays tied; PEFT reads both.
        language_model: the module inside of which they are, in a composite model; its other parts may have modules of
            the same names.
    """

    tensors: Mapping[str, Tensor]
    base_name: str
    rank: int
    alpha: float
    dropout: float
    ranks: Mapping[str, float] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    has_magnitudes: bool = False
    parameters: Sequence[str] = ()
    new_tokens: Sequence[int] = ()
    modules_to_save: Sequence[str] = ()
    tied_ends: tuple[str, str] | None = None
    language_model: str = ""


def save_adapter(folder: Path, content: AdapterContent) -> None:
    """Write a PEFT adapter folder: weights and ``adapter_config.json``; whole or not at all.

    Args:
        folder: to create or replace.
        content: what to write.
    """
    from safetensors.torch import save_file

    tensors = dict(content.tensors)
    if content.tied_ends is not None:
        embedding, head = (f"base_model.model.{name}.weight" for name in content.tied_ends)
        tensors[head] = tensors[embedding].clone()
    with replacing(folder) as partial:
        partial.mkdir()
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.dumps(_peft_config(content), indent=2)
        (partial / "adapter_config.json").write_text(config + "\n", encoding="utf-8")


def _peft_config(content: AdapterContent) -> dict[str, object]:
    """Return the content of ``adapter_config.json``, in PEFT's order of fields."""
    return {
        **({"ensure_weight_tying": True} if content.tied_ends else {}),
        "alpha_pattern": {name: _plain(number) for name, number in content.alphas.items()},
        "base_model_name_or_path": content.base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(content.alpha),
        # PEFT refuses to load updates of parameters with dropout, which acts in training only.
        "lora_dropout": 0.0 if content.parameters else content.dropout,
        "modules_to_save": list(content.modules_to_save) or None,
        "peft_type": "LORA",
        "r": content.rank,
        "rank_pattern": {name: int(number) for name, number in content.ranks.items()},
        "target_modules": _target_modules(content),
        **({"target_parameters": list(content.parameters)} if content.parameters else {}),
        "task_type": "CAUSAL_LM",
        **({"trainable_token_indices": _token_rows(content)} if content.new_tokens else {}),
        "use_dora": content.has_magnitudes,
        "use_rslora": content.rank_stabilised,
    }


def _target_modules(content: AdapterContent) -> str | list[str]:
    """Return the ends of the adapted modules' names, or in a composite model a pattern of the whole names."""
    wrapped = {"base_layer", *(name.split(".")[-2] for name in content.parameters)}
    modules = {name.split(".")[-3] for name in content.tensors if name.endswith(".lora_A.weight")} - wrapped
    ends = sorted(modules)
    if not content.language_model:
        return ends
    return f"{re.escape(content.language_model)}\\..+\\.({'|'.join(map(re.escape, ends))})"


def _plain(number: float) -> float:
    """Return a number as PEFT writes it: whole ones as integers."""
    return int(number) if number == int(number) else number


def _token_rows(content: AdapterContent) -> dict[str, list[int]]:
    """Return the new tokens by the module of whose weight the tensors have rows."""
    end = ".token_adapter.trainable_tokens_delta"
    return {name.split(".")[-3]: list(content.new_tokens) for name in content.tensors if name.endswith(end)}
