"""Writes the trained adapter in PEFT's format, the same for every engine."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
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
    rank_stabilised: bool = False,
    parameters: Sequence[str] = (),
    language_model: str = "",
) -> None:
    """Write a PEFT adapter folder: weights and ``adapter_config.json``; whole or not at all.

    Args:
        folder: to create or replace.
        tensors: A and B under PEFT's names and in its form, fp32, on the CPU.
        base_name: the base model's name in the config.
        rank, alpha, dropout: of the training.
        rank_stabilised: whether the scale is ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        parameters: PEFT's ``target_parameters``: the weights with updates of their own that are no module's only one.
        language_model: the module inside of which they are, in a composite model; its other parts may have modules of
            the same names.
    """
    from safetensors.torch import save_file

    wrapped = {"base_layer", *(name.split(".")[-2] for name in parameters)}
    modules = sorted({name.split(".")[-3] for name in tensors} - wrapped)
    inside = f"{re.escape(language_model)}\\..+\\.({'|'.join(map(re.escape, modules))})"
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        # PEFT refuses to load updates of parameters with dropout, which acts in training only.
        "lora_dropout": 0.0 if parameters else dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": inside if language_model else modules,
        **({"target_parameters": list(parameters)} if parameters else {}),
        "task_type": "CAUSAL_LM",
        "use_rslora": rank_stabilised,
    }
    with replacing(folder) as partial:
        partial.mkdir()
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
