"""torchtune's distributed LoRA recipe: the base and the adapter are parted over the processes, by FSDP2.

A step takes the same chats as in one process. torchtune sums the losses of its labels, FSDP averages the gradients over
the processes, and torchtune's loop multiplies them by processes / labels: they are those of the mean over all labels.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtune import training
from torchtune.modules.peft import get_adapter_params

from . import checkpoint
from .recipe import Ours, class_of
from .world import World

_WRAPPED = "_checkpoint_wrapped_module."  # what recomputing activations puts into the names


def _nothing() -> None:
    pass


class _LossOfAny(nn.Module):
    """torchtune's loss, but of no label it is 0; the base is computed by all processes together, labels or not."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self._loss = loss
        self.ignore_index: int = loss.ignore_index

    def forward(self, logits: Any, labels: Tensor) -> Tensor:
        """The mean over the labels that count."""
        if (labels != self.ignore_index).any():
            loss: Tensor = self._loss(logits, labels)
            return loss
        parts = logits if isinstance(logits, list) else [logits]
        nothing: Tensor = sum(each.float().sum() for each in parts) * 0.0
        return nothing


class Recipe(Ours, class_of("lora_finetune_distributed", "LoRAFinetuneRecipeDistributed")):  # type: ignore[misc]
    """The recipe for one of several processes."""

    def __init__(self, cfg: DictConfig, task: dict[str, Any], world: World, resumed: checkpoint.State | None) -> None:
        super().__init__(cfg, task, world, resumed)
        self._is_rank_zero = world.writes  # to torchtune: who tells
        self.rank = -1  # and who shows a progress bar, which would stand in the lines of events

    def setup(self, cfg: DictConfig) -> None:
        super().setup(cfg)
        self._loss_fn = _LossOfAny(self._loss_fn)

    def _setup_model(self, **options: Any) -> Any:
        tells, on_gpu = self._is_rank_zero, self._device.type == "cuda"
        self._is_rank_zero = tells and on_gpu  # or torchtune would ask a CPU for its GPU's memory, and fail
        model = super()._setup_model(**options)
        self._is_rank_zero = tells
        self.adapter_params = {name.replace(_WRAPPED, ""): each for name, each in get_adapter_params(model).items()}
        return model

    def _setup_optimizer(self, cfg_optimizer: DictConfig, opt_state_dict: Any = None) -> Any:
        optimizer = super()._setup_optimizer(cfg_optimizer, opt_state_dict)
        optimizer.register_step_post_hook(self._after_step)
        return optimizer

    def train(self) -> None:
        if self._device.type == "cpu":  # it would free a GPU's memory, and fails where there is none
            training.cleanup_before_training = _nothing
        super().train()

    def _placed(self, value: Tensor, parameter: Tensor) -> Tensor:
        moved = value.to(self._device)
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
        return moved

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _begin_draws(self) -> None:
        """Each process draws for itself; with as many processes as before, the same numbers as before."""
        self._world.draw_for(self._task["seed"], self.global_step)

    def _after_step(self, *unused: Any) -> None:
        self._world.draw_for(self._task["seed"], self.global_step + 1)  # torchtune counts the step after this

    def _loss_step(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch, as torchtune's loop computes it."""
        labels = batch["labels"]
        logits = self._model(tokens=batch["tokens"])
        shifted = labels.roll(-1, dims=1)
        shifted[:, -1] = self._loss_fn.ignore_index
        loss: Tensor = self._loss_fn(logits, shifted)
        return loss

    def _evaluate(self) -> None:
        super()._evaluate()
        self._model.reshard()  # a forward alone leaves the outermost part together

    def cleanup(self) -> None:
        dist.barrier()
        super().cleanup()
