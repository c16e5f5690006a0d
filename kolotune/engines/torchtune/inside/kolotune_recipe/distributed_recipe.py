"""torchtune's distributed LoRA recipe: FSDP2 shards the base and the adapter over the processes.

A step has the same chats as in one process. torchtune sums the losses of its labels, FSDP averages the gradients over
the processes, and torchtune's loop multiplies them by processes / labels: together, the mean over all labels.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtune import training
from torchtune.modules.peft import get_adapter_params

from .checkpoint import RecipeState
from .common_recipe import CommonRecipe, recipe_class
from .process_group import RecipeProcessGroup

_WRAPPED = "_checkpoint_wrapped_module."  # part of the names when activations are recomputed


def _do_nothing() -> None:
    pass


class _LossWithoutLabels(nn.Module):
    """torchtune's loss, but 0 for a batch without labels: all processes must compute the sharded base together."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self._loss = loss
        self.ignore_index: int = loss.ignore_index

    def forward(self, logits: Any, labels: Tensor) -> Tensor:
        """Return the mean over the labels that count."""
        if (labels != self.ignore_index).any():
            loss: Tensor = self._loss(logits, labels)
            return loss
        parts = logits if isinstance(logits, list) else [logits]
        zero: Tensor = sum(each.float().sum() for each in parts) * 0.0
        return zero


_TorchtuneRecipe: Any = recipe_class("lora_finetune_distributed", "LoRAFinetuneRecipeDistributed")


class DistributedRecipe(CommonRecipe, _TorchtuneRecipe):  # type: ignore[misc]
    """The recipe for one of several processes."""

    def __init__(
        self, cfg: DictConfig, task: dict[str, Any], group: RecipeProcessGroup, resumed: RecipeState | None
    ) -> None:
        super().__init__(cfg, task, group, resumed)
        self._is_rank_zero = group.writes  # torchtune: this process reports
        self.rank = -1  # torchtune: rank 0 shows a progress bar, which would mix with the events

    def setup(self, cfg: DictConfig) -> None:
        super().setup(cfg)
        self._loss_fn = _LossWithoutLabels(self._loss_fn)

    def _setup_model(self, **options: Any) -> Any:
        reports, on_gpu = self._is_rank_zero, self._device.type == "cuda"
        self._is_rank_zero = reports and on_gpu  # on a CPU torchtune would ask for a GPU's memory, and fail
        model = super()._setup_model(**options)
        self._is_rank_zero = reports
        self.adapter_params = {name.replace(_WRAPPED, ""): each for name, each in get_adapter_params(model).items()}
        return model

    def _setup_optimizer(self, cfg_optimizer: DictConfig, opt_state_dict: Any = None) -> Any:
        optimizer = super()._setup_optimizer(cfg_optimizer, opt_state_dict)
        optimizer.register_step_post_hook(self._after_step)
        return optimizer

    def train(self) -> None:
        if self._device.type == "cpu":  # it frees a GPU's memory, and fails without a GPU
            training.cleanup_before_training = _do_nothing
        super().train()

    def _on_device(self, value: Tensor, parameter: Tensor) -> Tensor:
        moved = value.to(self._device)
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
        return moved

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _restore_random_state(self) -> None:
        """Seed this process's random numbers, which depend on the step and the number of processes."""
        self._group.seed_step(self._task["seed"], self.global_step)

    def _after_step(self, *unused: Any) -> None:
        self._group.seed_step(self._task["seed"], self.global_step + 1)  # torchtune counts the step later

    def _loss_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of a batch, as torchtune's loop computes it."""
        labels = batch["labels"]
        logits = self._model(tokens=batch["tokens"])
        shifted = labels.roll(-1, dims=1)
        shifted[:, -1] = self._loss_fn.ignore_index
        loss: Tensor = self._loss_fn(logits, shifted)
        return loss

    def _evaluate(self) -> None:
        super()._evaluate()
        self._model.reshard()  # a forward pass without a backward pass leaves the outermost module gathered

    def cleanup(self) -> None:
        dist.barrier()
        super().cleanup()
