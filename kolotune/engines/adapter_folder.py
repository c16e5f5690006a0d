"""Writes the trained adapter in PEFT's format, the same for every engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.files import replacing

if TYPE_CHECKING:
    from torch import Tensor


def save_adapter(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    base_name: str,
    rank: int,
    alpha: float,
    dropout: float,
    ranks: Mapping[str, float] | None = None,
    alphas: Mapping[str, float] | None = None,
    rank_stabilised: bool = False,
    has_magnitudes: bool = False,
    parameters: Sequence[str] = (),
    new_tokens: Sequence[int] = (),
    modules_to_save: Sequence[str] = (),
    tied_ends: tuple[str, str] | None = None,
    language_model: str = "",
) -> None:
    """Write a PEFT adapter folder: weights and ``adapter_config.json``; whole or not at all.

    Args:
        folder: to create or replace.
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
    from safetensors.torch import save_file

    if tied_ends is not None:
        embedding, head = (f"base_model.model.{name}.weight" for name in tied_ends)
        tensors = {**tensors, head: tensors[embedding].clone()}
    wrapped = {"base_layer", *(name.split(".")[-2] for name in parameters)}
    modules = sorted({name.split(".")[-3] for name in tensors if name.endswith(".lora_A.weight")} - wrapped)
    inside = f"{re.escape(language_model)}\\..+\\.({'|'.join(map(re.escape, modules))})"
    config = {
        **({"ensure_weight_tying": True} if tied_ends else {}),
        "alpha_pattern": {name: _plain(number) for name, number in (alphas or {}).items()},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(alpha),
        # PEFT refuses to load updates of parameters with dropout, which acts in training only.
        "lora_dropout": 0.0 if parameters else dropout,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: int(number) for name, number in (ranks or {}).items()},
        "target_modules": inside if language_model else modules,
        **({"target_parameters": list(parameters)} if parameters else {}),
        "task_type": "CAUSAL_LM",
        **({"trainable_token_indices": _token_rows(tensors, new_tokens)} if new_tokens else {}),
        "use_dora": has_magnitudes,
        "use_rslora": rank_stabilised,
    }
    with replacing(folder) as partial:
        partial.mkdir()
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plain(number: float) -> float:
    """Return a number as PEFT writes it: whole ones as integers."""
    return int(number) if number == int(number) else number


def _token_rows(tensors: Iterable[str], tokens: Sequence[int]) -> dict[str, list[int]]:
    """Return the tokens by the module of whose weight the tensors have rows."""
    return {
        name.split(".")[-3]: list(tokens) for name in tensors if name.endswith(".token_adapter.trainable_tokens_delta")
    }
