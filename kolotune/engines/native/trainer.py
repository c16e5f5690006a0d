"""The trainer: optimizer steps, evaluation, and the state that a checkpoint stores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kolotune.foundation.errors import TrainingError
from kolotune.foundation.hardware import best_device
from kolotune.run_folder.layout import HELD_OUT_TOKENS, TRAIN_TOKENS
from kolotune.weights.starting_adapter import WEIGHTS

from ..job import TrainJob
from ..prepared_tokens import PreparedTokens, longest_first
from ..training_length import TrainingLength
from . import checkpointer, lora
from .checkpointer import TrainingState
from .lora_settings import LoraSettings
from .model import open_model
from .optimizer import AdapterOptimizer
from .process_group import ProcessGroup
from .starting_matrices import keep_start
from .transfers import sum_dtype


class Trainer:
    """One training: model, adapters, optimizer and state.

    Args:
        job: the training.
        group: the processes that train; None for this one alone.

    Attributes:
        figures: more figures of the last step or evaluation, by their names in the metrics.
        accuracy: of the last evaluation; None where only the loss says how good a model is.
    """

    accuracy: float | None = None

    def __init__(self, job: TrainJob, group: ProcessGroup | None = None) -> None:
        self.job = job
        self.device = best_device()
        self.group = group or ProcessGroup(self.device)
        self.tokens = PreparedTokens.load(Path(job.data) / TRAIN_TOKENS)
        held_out = Path(job.data) / HELD_OUT_TOKENS
        self.held_out = PreparedTokens.load(held_out) if held_out.is_file() else None
        longest = max((each.longest for each in (self.tokens, self.held_out) if each is not None), default=0)
        self.model = open_model(job, self.device, longest)
        self.adapters = self.model.adapters
        self._agree()
        if job.start_from:
            self.start()
        self.parameter = self.model.flat.parameter
        # Fused on the CPU only: a GPU's fused step wants its count of steps on the GPU, also after a resume.
        self.optimizer = AdapterOptimizer(
            self.adapters, self.model.flat, job.weight_decay, job.lora_plus_ratio, fused=self.device == "cpu"
        )
        self.length = TrainingLength.of(
            len(self.tokens), job.batch_size, job.gradient_accumulation, job.epochs, job.warmup_steps
        )
        self.state = TrainingState()
        self.figures: dict[str, float] = {}

    def _agree(self) -> None:
        """Take over the first process's adapters where they are computed from the base: the last bits may differ."""
        settings = LoraSettings.of(self.job)
        if self.group.size > 1 and (settings.has_magnitudes or settings.initial is not None):
            self.group.copy_first(self.model.flat.parameter.detach())
            if settings.initial is not None:
                keep_start(self.adapters)
            self.model.updated()

    def start(self) -> None:
        """Give the adapters the weights that the training starts from.

        Raises:
            TrainingError: the adapter is damaged, or is not for these layers of the base.
        """
        folder, own = Path(self.job.start_from), lora.adapter_tensors(self.adapters)
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{folder}: can't be read: {error}", "Copy the adapter again.") from None
        shapes = {name: each.shape for name, each in tensors.items()}
        if shapes != {name: each.shape for name, each in own.items()}:
            raise TrainingError(
                f"{folder}: its matrices are not those of an adapter for this base model",
                "Start from an adapter that was trained on this base model.",
            )
        lora.load_tensors(self.adapters, tensors)
        self.model.updated()

    def prepare(self, report: Callable[[str], None]) -> None:
        """Compute what has to be known before the first step.

        Args:
            report: gets a sentence for the user if that takes long.
        """

    def step(self, indices: Sequence[int], rate: float) -> float:
        """Make an optimizer step on the mean loss of the chats `indices`, of all labels by their weights; return it.

        Raises:
            TrainingError: the loss or a gradient is not finite; the weights stay as they were.
        """
        self.optimizer.zero_grad()
        self.group.seed_step(self.job.seed, self.state.step)
        self._apply_backoff()
        total = self._accumulate(indices)
        assert self.parameter.grad is not None
        self.group.sum_gradients(self.parameter.grad)
        norm = torch.linalg.vector_norm(self.parameter.grad)
        # The only values of a step that are read: on a GPU, reading waits for all that came before.
        loss, length = torch.stack([self.group.sum(total), norm.to(total.dtype)]).tolist()
        self._clip(length)
        if not math.isfinite(loss) or not math.isfinite(length):
            raise TrainingError(
                f"the loss is not finite at step {self.state.step + 1} (loss {loss}, gradient norm {length})",
                "Lower --learning-rate and train from scratch. The state before this step is kept as a checkpoint.",
            )
        self.optimizer.step(rate)
        self.model.updated()
        return float(loss)

    def _accumulate(self, indices: Sequence[int]) -> Tensor:
        """Add this process's share of a step's gradient; return its share of the loss, ``[]``."""
        labels = sum(self.tokens.label_weight(index) for index in indices) or 1
        total = self._zero()
        for group, counts in self._groups(self.tokens, indices):
            total += self.model.backward(self.tokens, group, counts / labels) * counts / labels
        return total

    def _groups(self, tokens: PreparedTokens, indices: Sequence[int]) -> list[tuple[list[int], float]]:
        """Return this process's share of the chats, in groups that are computed at once, each with a factor."""
        own = self.group.share(indices, self.model.costs(tokens, indices) if self.group.size > 1 else {})
        groups = self.model.groups(tokens, own)
        if self.job.sharded:
            return self.group.pad_groups(groups, self.model.groups(tokens, indices[-1:])[0])
        return [(group, 1.0) for group in groups]

    def _apply_backoff(self) -> None:
        """Limit how many chats are computed at once, by where memory ran out before this step."""
        self.model.backoffs = sum(first <= self.state.step for first in self.state.halvings)

    def _zero(self) -> Tensor:
        """Return a sum of losses to begin with, on the device."""
        device = self.parameter.device
        return torch.zeros((), dtype=sum_dtype(device), device=device)

    def _clip(self, norm: float) -> None:
        """Clip the gradient, whose norm is `norm`, to the job's maximal norm."""
        limit = self.job.max_grad_norm
        if limit and norm > limit:
            assert self.parameter.grad is not None
            self.parameter.grad.mul_(limit / norm)

    def evaluate(self) -> float | None:
        """Return the weighted mean loss of the held-out chats' labels; None when nothing is held out."""
        held_out = self.held_out
        if held_out is None or len(held_out) == 0:
            return None
        self._apply_backoff()
        groups = self._groups(held_out, longest_first(held_out))
        total = self._zero()
        for group, counts in groups:
            total += self.model.loss(held_out, group) * counts
        return float(self.group.sum(total)) / (sum(held_out.label_weight(index) for index in range(len(held_out))) or 1)

    def snapshot(self) -> TrainingState:
        """Return the whole state, as a checkpoint stores it."""
        tensors = lora.adapter_tensors(self.adapters)
        for name, each in self.optimizer.tensors().items():
            tensors[f"optimizer.{name}"] = each.detach().to("cpu", copy=True).contiguous()
        tensors |= checkpointer.random_state()
        tensors |= {name: each for name, each in self.state.tensors.items() if name.startswith("best.")}
        return dataclasses.replace(self.state, tensors=tensors)

    def restore(self, state: TrainingState) -> None:
        """Restore what `snapshot` returned."""
        lora.load_tensors(self.adapters, state.tensors)
        self.model.updated()
        self.optimizer.restore(state.tensors_under("optimizer."))
        checkpointer.restore_random_state(state)
        self.state = state
