"""torchtune's LoRA recipes, with the parts that they get wrong or lack put in their place.

Loop, loss, model, optimizer and schedule are torchtune's. Ours are: where the chats come from (none is
dropped), the held-out loss, checkpoints that are whole or invisible, a schedule that goes on where it stopped
(torchtune 0.6.1 begins a resumed one anew), the adapter's first weights, which are those of its seed alone, and a stop
before a step that is not finite.
"""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torchtune import config as components
from torchtune import training
from torchtune.models import convert_weights
from torchtune.modules.peft import get_adapter_params

from . import checkpoint, found
from .chats import IGNORED, Chats, Loader, at_once, batches_of_step, in_order
from .events import DisagreementError, Metrics, NotFiniteError, emit
from .world import World

_RECIPES = Path(torchtune.__file__).parent.parent / "recipes"
_COMPONENT = "_component_"


def class_of(file: str, name: str) -> Any:
    """A class of torchtune's recipes; their folder can't be imported by name."""
    spec = importlib.util.spec_from_file_location(file, _RECIPES / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


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
    """Trains as the task says. Paths come from it and never pass through torchtune's config.

    Raises:
        NotFiniteError: the loss or a gradient is no number.
        DisagreementError: machines that train together were asked for different things.
    """
    config = config_of(task)
    world = World(config.device)
    differing = world.differing({**task["identity"], "epochs": config.epochs})
    if differing:
        raise DisagreementError(", ".join(differing))
    resumed = _newest(task, world)
    halvings = resumed.halvings if resumed else []
    more = world.longest(task["halvings"])[len(halvings) :]  # memory may have run out on one machine of several
    task["halvings"] = [*halvings, *(max(each, resumed.step if resumed else 0) for each in more)]
    accumulation = int(config.gradient_accumulation_steps)
    config.gradient_accumulation_steps = batches_of_step(config.batch_size, accumulation, task["halvings"], world.size)
    if world.writes:
        OmegaConf.save(config, "torchtune.yaml")
    recipe: Any = Recipe
    if world.size > 1:
        from .several import Recipe as recipe
    made = recipe(config, {**task, "accumulation": accumulation}, world, resumed)
    made.setup(config)
    made.train()
    made.cleanup()


def _newest(task: dict[str, Any], world: World) -> checkpoint.State | None:
    """Where the training goes on: the newest whole checkpoint that any machine has; None: it begins."""
    there = found.newest(Path(task["checkpoints"])) if world.writes else None

    def load() -> checkpoint.State:
        assert there is not None
        return checkpoint.load(there[0])

    state: checkpoint.State | None = world.newest(there[1]["epoch"] if there else None, load)
    return state


def first_adapter(model: DictConfig, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The weights that an adapter begins with, as PEFT and torchtune draw them, by torchtune's names.

    They depend on the seed alone: not on the base's weights, the device or the number of processes.
    """
    with training.set_default_dtype(dtype), torch.device("meta"):
        shapes = get_adapter_params(components.instantiate(model))
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.zeros(each.shape) for name, each in shapes.items()}
    for name, each in weights.items():
        if name.endswith("lora_a.weight"):
            nn.init.kaiming_uniform_(each, a=math.sqrt(5), generator=generator)
    return {name: each.to(dtype) for name, each in weights.items()}


def _any_base() -> Any:
    """The recipe stands beside this in the classes that are made of it."""
    return object


class Ours(_any_base()):  # type: ignore[misc] # its base is known when a recipe is made of it
    """What is ours in torchtune's recipe, for one process and for several.

    Args:
        cfg: torchtune's config.
        task: what the driver told.
        world: the processes that train.
        resumed: where to go on; None: at the beginning.
    """

    _loss_fn: Any

    def __init__(self, cfg: DictConfig, task: dict[str, Any], world: World, resumed: checkpoint.State | None) -> None:
        self._task, self._world, self._resumed = task, world, resumed
        self._metrics = Metrics(Path(task["metrics"]))
        if world.writes:
            self._metrics.cut(resumed.step if resumed else 0)
        super().__init__(cfg)
        held_out = Path(task["data"], "held_out.safetensors")
        self._held_out = Chats.load(held_out) if held_out.is_file() else None
        self._batch_size = int(cfg.batch_size)
        self._rate = 0.0

    def setup(self, cfg: DictConfig) -> None:
        super().setup(cfg)
        if self._world.writes:
            self._metric_logger.on_step = self._on_step
            emit(
                "started",
                device=self._device.type,
                processes=self._world.size,
                epoch=self.epochs_run,
                step=self.global_step,
                halvings=self._task["halvings"],
            )

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
        weights = convert_weights.hf_to_tune(weights, **self._task["heads"])
        if self._task["four_bit"]:  # the distributed recipe rounds before it packs, the other one does not
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
                moved = {key: self._placed(each, parameter) for key, each in values.items()}
                optimizer.state[parameter] = moved
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # a schedule that goes on asks for it
        optimizer.register_step_pre_hook(self._before_step)
        return optimizer

    def _placed(self, value: Tensor, parameter: Tensor) -> Tensor:
        """A value of the optimizer's, where its parameter is."""
        del parameter
        return value.to(self._device)

    def _setup_data(self, *, batch_size: int, **others: Any) -> Loader:
        del others
        chats, task, world = Chats.load(Path(self._task["data"], "train.safetensors")), self._task, self._world
        return Loader(chats, batch_size, task["accumulation"], task["seed"], task["halvings"], world.rank, world.size)

    def _setup_lr_scheduler(self, cfg_lr_scheduler: DictConfig, num_training_steps: int, last_epoch: int) -> Any:
        del last_epoch
        self.global_step = self.epochs_run * self._steps_per_epoch
        return super()._setup_lr_scheduler(
            cfg_lr_scheduler, num_training_steps=num_training_steps, last_epoch=self.global_step - 1
        )

    def train(self) -> None:
        self._begin_draws()
        if self.epochs_run == 0:
            self._evaluate()
        if self.epochs_run == self.total_epochs:  # none are wanted, or one of several machines lacks the last
            self._save()
        self._clock = time.perf_counter()
        super().train()

    def _begin_draws(self) -> None:
        """Dropout goes on with the numbers that would have come."""
        if self._resumed is not None:
            checkpoint.restore_random_state(self._resumed.random)

    def _before_step(self, optimizer: Any, *unused: Any) -> None:
        """Called with the gradients in place and the weights as they were."""
        self._rate = float(optimizer.param_groups[0]["lr"])
        gradients = [self._own(each.grad) for each in self.adapter_params.values() if each.grad is not None]
        finite = bool(torch.stack([each.isfinite().all() for each in gradients]).all())
        if self._world.total(float(not finite)):
            raise NotFiniteError(f"a gradient is not finite at step {self.global_step + 1}")

    def _own(self, tensor: Tensor) -> Tensor:
        """What of a tensor is in this process."""
        return tensor

    def _whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which each process may have a part; all of them ask for it."""
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
        """Tells the mean loss of the held-out chats' labelled tokens."""
        if self._held_out is None or not len(self._held_out):
            return
        self._model.eval()
        total, labels = 0.0, 0
        size = at_once(self._batch_size, self._task["halvings"], self.global_step)
        for batch in in_order(self._held_out, size, self._world.rank, self._world.size):
            count = int((batch["labels"] != IGNORED).sum())
            total += float(self._loss_step({name: each.to(self._device) for name, each in batch.items()})) * count
            labels += count
        self._model.train()
        loss = self._world.total(total) / max(1.0, self._world.total(labels))
        if self._world.writes:
            self._metrics.write(step=self.global_step, held_out_loss=loss)
            emit("evaluation", step=self.global_step, held_out_loss=loss)

    def save_checkpoint(self, epoch: int) -> None:
        """Called by torchtune's loop at the end of each epoch."""
        del epoch
        self._evaluate()
        self._save()
        self._clock = time.perf_counter()

    def _save(self) -> None:
        adapter = {name: self._whole(each.detach()) for name, each in self.adapter_params.items()}
        optimizer = {
            name: {key: self._whole(torch.as_tensor(value)) for key, value in self._optimizer.state[each].items()}
            for name, each in self.adapter_params.items()
            if each in self._optimizer.state
        }
        task, root = self._task, Path(self._task["checkpoints"])
        if not self._world.writes or found.whole(found.folder_of(root, self.epochs_run)) is not None:
            return
        peft = convert_weights.tune_to_peft_adapter_weights(
            {name: each.float() for name, each in adapter.items()}, **task["heads"]
        )
        state = checkpoint.State(
            self.epochs_run, self.global_step, adapter, optimizer, checkpoint.random_state(), task["halvings"]
        )
        checkpoint.save(root, state, peft, task["identity"])
        emit("checkpoint", epoch=self.epochs_run, step=self.global_step)


class Recipe(Ours, class_of("lora_finetune_single_device", "LoRAFinetuneRecipeSingleDevice")):  # type: ignore[misc]
    """The recipe for one process."""

    def _loss_step(self, batch: dict[str, Tensor]) -> Tensor:
        if not (batch["labels"] != IGNORED).any():
            first: Tensor = next(iter(self.adapter_params.values()))
            return first.sum() * 0.0  # torchtune's mean over no label is no number
        loss: Tensor = super()._loss_step(batch)
        return loss


def _memory_mb(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    import psutil

    return int(psutil.Process().memory_info().rss) >> 20
