"""What kolotune changes in torchtune's LoRA recipes, for one process and for several.

Loop, loss, model, optimizer and schedule are torchtune's. Changed are:

- the dataloader, which drops no chat;
- the held-out loss, which torchtune does not compute;
- checkpoints, which are whole or invisible;
- the schedule, which continues in a resumed training (torchtune 0.6.1 restarts it);
- the adapter's initial weights, which depend on the seed alone;
- steps that are not finite, which end the training.
"""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torchtune import config as components
from torchtune import training
from torchtune.models import convert_weights
from torchtune.modules.peft import get_adapter_params

from . import checkpoint, checkpoint_files
from .checkpoint import RecipeState
from .data import IGNORED, Loader, TokenizedChats, evaluation_batches, micro_batch_size
from .events import MetricsFile, NotFiniteError, emit
from .process_group import RecipeProcessGroup

RECIPES = Path(torchtune.__file__).parent.parent / "recipes"


def recipe_class(file: str, name: str) -> Any:
    """Load a class of torchtune's recipes; their folder can't be imported by name."""
    spec = importlib.util.spec_from_file_location(file, RECIPES / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def first_adapter(model: DictConfig, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Return the initial weights of an adapter, distributed as in PEFT and torchtune, by torchtune's names.

    They depend on the seed alone, not on the base's weights, the device or the number of processes.
    """
    with training.set_default_dtype(dtype), torch.device("meta"):
        shapes = get_adapter_params(components.instantiate(model))
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.zeros(parameter.shape) for name, parameter in shapes.items()}
    for name, weight in weights.items():
        if name.endswith("lora_a.weight"):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    return {name: weight.to(dtype) for name, weight in weights.items()}


def _recipe_base() -> Any:
    """Return the static base of `CommonRecipe`, whose other base is a torchtune recipe in each subclass."""
    return object


class CommonRecipe(_recipe_base()):  # type: ignore[misc] # subclasses add torchtune's recipe
    """The changes to a torchtune recipe.

    Args:
        cfg: torchtune's config.
        task: the driver's task.
        group: the processes that train.
        resumed: the checkpoint to resume from; None for a training from scratch.
    """

    _loss_fn: Any

    def __init__(
        self, cfg: DictConfig, task: dict[str, Any], group: RecipeProcessGroup, resumed: RecipeState | None
    ) -> None:
        self._task, self._group, self._resumed = task, group, resumed
        self._metrics = MetricsFile(Path(task["metrics"]))
        if group.writes:
            self._metrics.truncate(resumed.step if resumed else 0)
        super().__init__(cfg)
        held_out = Path(task["data"], "held_out.safetensors")
        self._held_out = TokenizedChats.load(held_out) if held_out.is_file() else None
        self._batch_size = int(cfg.batch_size)
        self._rate = 0.0

    def setup(self, cfg: DictConfig) -> None:
        super().setup(cfg)
        if self._group.writes:
            self._metric_logger.on_step = self._on_step
            emit(
                "started",
                device=self._device.type,
                processes=self._group.size,
                epoch=self.epochs_run,
                step=self.global_step,
                halvings=self._task["halvings"],
            )

    def load_checkpoint(self, cfg_checkpointer: DictConfig) -> dict[str, Any]:
        """Return the base model's weights, under torchtune's names and in the order of its rotary embedding."""
        del cfg_checkpointer
        weights: dict[str, Tensor] = {}
        for name in self._task["weight_files"]:
            weights |= load_file(Path(self._task["base_model"], name))
        if self._task["tied"]:
            weights.pop("lm_head.weight", None)  # some files hold it all the same; the embedding counts
        if self._resumed is not None:
            self.epochs_run = self._resumed.epoch
        weights = convert_weights.hf_to_tune(weights, **self._task["heads"])
        if self._task["four_bit"]:  # the distributed recipe rounds before it packs, the single-process one does not
            weights = {name: each.to(self._dtype) for name, each in weights.items()}
        return {training.MODEL_KEY: weights}

    def _setup_model(self, *, cfg_model: DictConfig, **options: Any) -> Any:
        if self._resumed is not None:
            adapter = self._resumed.adapter
        else:
            adapter = first_adapter(cfg_model, self._dtype, self._task["seed"])
        return super()._setup_model(**{**options, "cfg_model": cfg_model, "lora_weights_state_dict": adapter})

    def _setup_optimizer(self, cfg_optimizer: DictConfig, opt_state_dict: Any = None) -> Any:
        optimizer = super()._setup_optimizer(cfg_optimizer, None)
        if self._resumed is not None:
            for name, values in self._resumed.optimizer.items():
                parameter = self.adapter_params[name]
                moved = {key: self._on_device(each, parameter) for key, each in values.items()}
                optimizer.state[parameter] = moved
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # needed by a schedule that continues
        optimizer.register_step_pre_hook(self._before_step)
        return optimizer

    def _on_device(self, value: Tensor, parameter: Tensor) -> Tensor:
        """Move a value of the optimizer to where its parameter is."""
        del parameter
        return value.to(self._device)

    def _setup_data(self, *, batch_size: int, **others: Any) -> Loader:
        del others
        chats, task, group = TokenizedChats.load(Path(self._task["data"], "train.safetensors")), self._task, self._group
        return Loader(chats, batch_size, task["accumulation"], task["seed"], task["halvings"], group.rank, group.size)

    def _setup_lr_scheduler(self, cfg_lr_scheduler: DictConfig, num_training_steps: int, last_epoch: int) -> Any:
        del last_epoch
        self.global_step = self.epochs_run * self._steps_per_epoch
        return super()._setup_lr_scheduler(
            cfg_lr_scheduler, num_training_steps=num_training_steps, last_epoch=self.global_step - 1
        )

    def train(self) -> None:
        self._restore_random_state()
        if self.epochs_run == 0:
            self._evaluate()
        # No epochs are configured, or one of several machines lacks the last checkpoint.
        if self.epochs_run == self.total_epochs:
            self._save()
        self._clock = time.perf_counter()
        super().train()

    def _restore_random_state(self) -> None:
        """Let dropout continue with the random numbers that would have come next."""
        if self._resumed is not None:
            checkpoint.restore_random_state(self._resumed.random)

    def _before_step(self, optimizer: Any, *unused: Any) -> None:
        """Refuse gradients that are not finite, before the weights change."""
        self._rate = float(optimizer.param_groups[0]["lr"])
        gradients = [self._local(each.grad) for each in self.adapter_params.values() if each.grad is not None]
        finite = bool(torch.stack([each.isfinite().all() for each in gradients]).all())
        if self._group.sum(float(not finite)):
            raise NotFiniteError(f"a gradient is not finite at step {self.global_step + 1}")

    def _local(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor that is in this process."""
        return tensor

    def _whole(self, tensor: Tensor) -> Tensor:
        """Return a whole tensor that may be sharded; all processes must call it together."""
        return tensor

    def _on_step(self, loss: float) -> None:
        now, self._clock = self._clock, time.perf_counter()
        speed = self._dataloader.tokens_read / (self._clock - now)
        self._dataloader.tokens_read = 0
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise NotFiniteError(f"the loss is not finite at step {self.global_step}")
        self._metrics.write(
            step=self.global_step,
            epoch=round(self.global_step / self._steps_per_epoch, 4),
            loss=loss,
            learning_rate=self._rate,
            tokens_per_second=round(speed, 1),
            memory_mb=_memory_mb(self._device.type),
        )
        steps = self.total_epochs * self._steps_per_epoch
        emit("step", step=self.global_step, steps=steps, loss=loss, tokens_per_second=speed)

    @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def _evaluate(self) -> None:
        """Report the mean loss of the held-out chats' labels."""
        if self._held_out is None or not len(self._held_out):
            return
        self._model.eval()
        total, labels = 0.0, 0
        size = micro_batch_size(self._batch_size, self._task["halvings"], self.global_step)
        for batch in evaluation_batches(self._held_out, size, self._group.rank, self._group.size):
            count = int((batch["labels"] != IGNORED).sum())
            total += float(self._loss_step({name: each.to(self._device) for name, each in batch.items()})) * count
            labels += count
        self._model.train()
        loss = self._group.sum(total) / max(1.0, self._group.sum(labels))
        if self._group.writes:
            self._metrics.write(step=self.global_step, held_out_loss=loss)
            emit("evaluation", step=self.global_step, held_out_loss=loss)

    def save_checkpoint(self, epoch: int) -> None:
        """Evaluate and save; torchtune's loop calls this after each epoch."""
        del epoch
        self._evaluate()
        self._save()
        self._clock = time.perf_counter()

    def _save(self) -> None:
        adapter = {name: self._whole(weight.detach()) for name, weight in self.adapter_params.items()}
        optimizer = {
            name: {key: self._whole(torch.as_tensor(value)) for key, value in self._optimizer.state[weight].items()}
            for name, weight in self.adapter_params.items()
            if weight in self._optimizer.state
        }
        task, root = self._task, Path(self._task["checkpoints"])
        folder = checkpoint_files.folder_of(root, self.epochs_run)
        if not self._group.writes or checkpoint_files.facts_if_whole(folder) is not None:
            return
        peft = convert_weights.tune_to_peft_adapter_weights(
            {name: weight.float() for name, weight in adapter.items()}, **task["heads"]
        )
        state = RecipeState(
            self.epochs_run, self.global_step, adapter, optimizer, checkpoint.random_state(), task["halvings"]
        )
        checkpoint.save(root, state, peft, task["identity"])
        emit("checkpoint", epoch=self.epochs_run, step=self.global_step)


def _memory_mb(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    import psutil

    return int(psutil.Process().memory_info().rss) >> 20
