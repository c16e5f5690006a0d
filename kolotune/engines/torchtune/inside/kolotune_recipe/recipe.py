"""torchtune's single-device LoRA recipe, with the parts that it gets wrong or lacks put in their place.

Its loop, loss, model, optimizer and schedule are torchtune's. Ours are: where the chats come from (none is
dropped), the held-out loss, checkpoints that are whole or invisible, a schedule that goes on where it stopped
(torchtune 0.6.1 begins a resumed one anew), and a stop before a step that is not finite.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from torchtune import training
from torchtune.models import convert_weights

from . import checkpoint
from .chats import IGNORED, Chats, Loader, at_once, in_order
from .events import NotFiniteError, emit

_RECIPES = Path(torchtune.__file__).parent.parent / "recipes"
_COMPONENT = "_component_"


def _base_class() -> Any:
    """torchtune's recipe class; its folder of recipes can't be imported by name."""
    spec = importlib.util.spec_from_file_location("lora_recipe", _RECIPES / "lora_finetune_single_device.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAFinetuneRecipeSingleDevice


def config_of(task: dict[str, Any]) -> DictConfig:
    """torchtune's config for a task: one of its own with our values put in, or one that is all ours.

    A section for which we name a component is replaced as a whole, any other is filled in.
    """
    ours = OmegaConf.create(task["config"])
    if task["config_name"] is None:
        config = ours
    else:
        config = OmegaConf.load(_RECIPES / "configs" / f"{task['config_name']}.yaml")
        for name in ours:
            if OmegaConf.is_dict(ours[name]) and _COMPONENT not in ours[name]:
                config[name] = OmegaConf.merge(config[name], ours[name])
            else:
                config[name] = ours[name]
    config.device = "cuda" if torch.cuda.is_available() else "cpu"
    return config


def run(task: dict[str, Any]) -> None:
    """Trains as the task says. Paths come from it and never pass through torchtune's config."""
    config = config_of(task)
    OmegaConf.save(config, "torchtune.yaml")
    recipe = Recipe(config, task)
    recipe.setup(config)
    recipe.train()
    recipe.cleanup()


class Recipe(_base_class()):  # type: ignore[misc] # its base is known when it is loaded
    """The recipe for one task."""

    def __init__(self, cfg: DictConfig, task: dict[str, Any]) -> None:
        self._task = task
        self._resumed = checkpoint.load(Path(task["resume"])) if task["resume"] else None
        super().__init__(cfg)
        held_out = Path(task["data"], "held_out.safetensors")
        self._held_out = Chats.load(held_out) if held_out.is_file() else None
        self._batch_size = int(cfg.batch_size)
        self._rate = 0.0

    def setup(self, cfg: DictConfig) -> None:
        super().setup(cfg)
        self._metric_logger.on_step = self._on_step
        emit("started", device=self._device.type, steps=self.total_epochs * self._steps_per_epoch)

    def load_checkpoint(self, cfg_checkpointer: DictConfig) -> dict[str, Any]:
        """The base model's weights, under torchtune's names and in the order of its rotary embedding."""
        del cfg_checkpointer
        weights: dict[str, Tensor] = {}
        for name in self._task["weight_files"]:
            weights |= load_file(Path(self._task["base_model"], name))
        if self._task["tied"]:
            weights.pop("lm_head.weight", None)  # some files hold it nevertheless; the embedding counts
        if self._resumed is not None:
            self.epochs_run = self._resumed.epoch
        return {training.MODEL_KEY: convert_weights.hf_to_tune(weights, **self._task["heads"])}

    def _setup_model(self, **options: Any) -> Any:
        if self._resumed is not None:
            options["lora_weights_state_dict"] = self._resumed.adapter
        return super()._setup_model(**options)

    def _setup_optimizer(self, cfg_optimizer: DictConfig, opt_state_dict: Any = None) -> Any:
        optimizer = super()._setup_optimizer(cfg_optimizer, None)
        if self._resumed is not None:
            for name, values in self._resumed.optimizer.items():
                moved = {key: each.to(self._device) for key, each in values.items()}
                optimizer.state[self.adapter_params[name]] = moved
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # a schedule that goes on asks for it
        optimizer.register_step_pre_hook(self._before_step)
        return optimizer

    def _setup_data(self, *, batch_size: int, **others: Any) -> Loader:
        del others
        chats = Chats.load(Path(self._task["data"], "train.safetensors"))
        parts = self._task["parts"]
        accumulation = self._gradient_accumulation_steps // parts
        return Loader(chats, batch_size, accumulation, self._task["seed"], self._task["halvings"], parts)

    def _setup_lr_scheduler(self, cfg_lr_scheduler: DictConfig, num_training_steps: int, last_epoch: int) -> Any:
        del last_epoch
        self.global_step = self.epochs_run * self._steps_per_epoch
        return super()._setup_lr_scheduler(
            cfg_lr_scheduler, num_training_steps=num_training_steps, last_epoch=self.global_step - 1
        )

    def train(self) -> None:
        if self._resumed is not None:
            checkpoint.restore_random_state(self._resumed.random)
        if self.epochs_run == 0:
            self._evaluate()
        if self.total_epochs == 0:
            self._save()
        self._clock = time.perf_counter()
        super().train()

    def _loss_step(self, batch: dict[str, Tensor]) -> Tensor:
        if not (batch["labels"] != IGNORED).any():
            first: Tensor = next(iter(self.adapter_params.values()))
            return first.sum() * 0.0  # torchtune's mean over no label is no number
        loss: Tensor = super()._loss_step(batch)
        return loss

    def _before_step(self, optimizer: Any, *unused: Any) -> None:
        """Called with the gradients in place and the weights as they were."""
        self._rate = float(optimizer.param_groups[0]["lr"])
        gradients = [each.grad for each in self.adapter_params.values() if each.grad is not None]
        if not torch.stack([each.isfinite().all() for each in gradients]).all():
            raise NotFiniteError(f"a gradient is not finite at step {self.global_step + 1}")

    def _on_step(self, loss: float) -> None:
        now, self._clock = self._clock, time.perf_counter()
        speed = self._dataloader.tokens_read / (self._clock - now)
        self._dataloader.tokens_read = 0
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise NotFiniteError(f"the loss is not finite at step {self.global_step}")
        self._record(
            step=self.global_step,
            epoch=round(self.global_step / self._steps_per_epoch, 4),
            loss=loss,
            learning_rate=self._rate,
            tokens_per_second=round(speed, 1),
            memory_mb=_memory_mb(self._device.type),
        )
        steps = self.total_epochs * self._steps_per_epoch
        emit("step", step=self.global_step, steps=steps, loss=loss, tokens_per_second=speed)

    def _record(self, **fields: Any) -> None:
        """A line of the metrics. Written here and not by the driver: a checkpoint must never be ahead of them."""
        with Path(self._task["metrics"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**fields, "time": round(time.time(), 3)}) + "\n")

    @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def _evaluate(self) -> None:
        """Tells the mean loss of the held-out chats' labelled tokens."""
        if self._held_out is None or not len(self._held_out):
            return
        self._model.eval()
        total, labels = 0.0, 0
        for batch in in_order(self._held_out, at_once(self._batch_size, self._task["halvings"], self.global_step)):
            count = int((batch["labels"] != IGNORED).sum())
            if count:
                on_device = {name: each.to(self._device) for name, each in batch.items()}
                total += float(self._loss_step(on_device)) * count
                labels += count
        self._model.train()
        loss = total / max(1, labels)
        self._record(step=self.global_step, held_out_loss=loss)
        emit("evaluation", step=self.global_step, held_out_loss=loss)

    def save_checkpoint(self, epoch: int) -> None:
        """Called by torchtune's loop at the end of each epoch."""
        del epoch
        self._evaluate()
        self._save()
        self._clock = time.perf_counter()

    def _save(self) -> None:
        adapter = {name: each.detach() for name, each in self.adapter_params.items()}
        peft = convert_weights.tune_to_peft_adapter_weights(
            {name: each.float() for name, each in adapter.items()}, **self._task["heads"]
        )
        optimizer = {
            name: {key: torch.as_tensor(value) for key, value in self._optimizer.state[each].items()}
            for name, each in self.adapter_params.items()
            if each in self._optimizer.state
        }
        state = checkpoint.State(self.epochs_run, self.global_step, adapter, optimizer, checkpoint.random_state())
        task = self._task
        checkpoint.save(Path(task["checkpoints"]), state, peft, task["identity"], task["halvings"])
        emit("checkpoint", epoch=self.epochs_run, step=self.global_step)


def _memory_mb(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    import psutil

    return int(psutil.Process().memory_info().rss) >> 20
