"""torchtune's LoRA recipe for one process."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .common_recipe import CommonRecipe, recipe_class
from .data import IGNORED

_TorchtuneRecipe: Any = recipe_class("lora_finetune_single_device", "LoRAFinetuneRecipeSingleDevice")


class SingleProcessRecipe(CommonRecipe, _TorchtuneRecipe):  # type: ignore[misc]
    """torchtune's recipe with kolotune's changes."""

    def _loss_step(self, batch: dict[str, Tensor]) -> Tensor:
        if not (batch["labels"] != IGNORED).any():
            first: Tensor = next(iter(self.adapter_params.values()))
            return first.sum() * 0.0  # torchtune's mean over no label is not a number
        loss: Tensor = super()._loss_step(batch)
        return loss
