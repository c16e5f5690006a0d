"""The training loop, and what it needs of the model."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from kolotune.foundation.errors import TrainingError
from kolotune.foundation.hardware import best_device
from kolotune.run_folder.layout import HELD_OUT_TOKENS, TRAIN_TOKENS

from .. import events
from ..adapter_folder import save_adapter
from ..events import EvaluationDone, Note, StepDone, TrainingBegins, TrainingEvent, TrainingResult
from ..job import TrainJob
from ..metrics import MetricsWriter
from ..prepared_tokens import PreparedTokens, epoch_steps, longest_first
from ..training_length import TrainingLength
from . import checkpoints, lora
from .checkpoints import State
from .learning_rate import learning_rate_factor
from .model import open_model
from .world import World


class Trainer:
    """One training: model, adapters, optimizer, and where it stands.

    Args:
        job: what is trained.
        world: the processes that do it; None: this one alone.
    """

    def __init__(self, job: TrainJob, world: World | None = None) -> None:
        self.job = job
        self.device = best_device()
        self.world = world or World(self.device)
        self.tokens = PreparedTokens.load(Path(job.data) / TRAIN_TOKENS)
        held_out = Path(job.data) / HELD_OUT_TOKENS
        self.held_out = PreparedTokens.load(held_out) if held_out.is_file() else None
        longest = max((each.longest for each in (self.tokens, self.held_out) if each is not None), default=0)
        self.model = open_model(job, self.device, longest)
        self.adapters = self.model.adapters
        self.parameter = self.model.flat.parameter
        # Fused on the CPU only: a GPU's fused step wants its count of steps on the GPU, also after a resume.
        self.optimizer = torch.optim.AdamW(
            [self.parameter], lr=job.learning_rate, weight_decay=job.weight_decay, fused=self.device == "cpu"
        )
        self.length = TrainingLength.of(
            len(self.tokens), job.batch_size, job.gradient_accumulation, job.epochs, job.warmup_steps
        )
        self.state = State()

    def step(self, indices: Sequence[int], rate: float) -> float:
        """One optimizer step over the mean loss of all labelled tokens of the chats `indices`; returns that loss.

        Raises:
            TrainingError: the loss or a gradient is not finite; the weights are those before the step.
        """
        self.optimizer.zero_grad(set_to_none=False)
        self.world.draw_for(self.job.seed, self.state.step)
        self._split()
        labels = max(1, sum(self.tokens.label_count(index) for index in indices))
        total = 0.0
        for group, counts in self._groups(self.tokens, indices):
            total += self.model.backward(self.tokens, group, counts / labels) * counts / labels
        assert self.parameter.grad is not None
        self.world.add_up(self.parameter.grad)
        total = self.world.total(total)
        norm = self._clip()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise TrainingError(
                f"the loss is not finite at step {self.state.step + 1} (loss {total}, gradient norm {norm})",
                "Lower --learning-rate and train anew; the state before this step is kept among the checkpoints.",
            )
        for group_options in self.optimizer.param_groups:
            group_options["lr"] = rate
        self.optimizer.step()
        self.model.updated()
        return total

    def _groups(self, tokens: PreparedTokens, indices: Sequence[int]) -> list[tuple[list[int], float]]:
        """This process's part of the chats `indices`, in groups that are computed at once, and how much each counts."""
        own = self.world.share(indices, self.model.costs(tokens, indices) if self.world.size > 1 else {})
        groups = self.model.groups(tokens, own)
        if self.job.sharded:
            return self.world.as_many(groups, list(indices[-1:]))
        return [(group, 1.0) for group in groups]

    def _split(self) -> None:
        """How many chats are computed at once at this step: no more than memory was found to hold."""
        self.model.halvings = sum(first <= self.state.step for first in self.state.halvings)

    def _clip(self) -> float:
        """Shortens the gradient to the job's longest norm; returns the norm that it had."""
        assert self.parameter.grad is not None
        norm, limit = float(torch.linalg.vector_norm(self.parameter.grad)), self.job.max_grad_norm
        if limit and norm > limit:
            self.parameter.grad.mul_(limit / norm)
        return norm

    def evaluate(self) -> float | None:
        """The mean loss of the held-out chats' labelled tokens; None when nothing is held out."""
        held_out = self.held_out
        if held_out is None or len(held_out) == 0:
            return None
        self._split()
        groups = self._groups(held_out, longest_first(held_out))
        total = self.world.total(sum(self.model.loss(held_out, group) * counts for group, counts in groups))
        return total / max(1, sum(held_out.label_count(index) for index in range(len(held_out))))

    def snapshot(self) -> State:
        """The whole state, as it goes into a checkpoint."""
        tensors = lora.adapter_tensors(self.adapters)
        for key, value in self.optimizer.state.get(self.parameter, {}).items():
            parts = {"": value} if key == "step" else self.model.flat.named(value)
            for name, part in parts.items():
                tensors[f"optimizer.{key}.{name}"] = part.detach().to("cpu", copy=True).contiguous()
        tensors |= checkpoints.random_state()
        tensors |= {name: each for name, each in self.state.tensors.items() if name.startswith("best.")}
        return dataclasses.replace(self.state, tensors=tensors)

    def restore(self, state: State) -> None:
        """Puts back what `snapshot` gave."""
        lora.load_tensors(self.adapters, state.tensors)
        self.model.updated()
        if "optimizer.step." in state.tensors:
            restored = {"step": state.tensors["optimizer.step."]}
            for key in ("exp_avg", "exp_avg_sq"):
                restored[key] = torch.zeros_like(self.parameter)
                saved = state.part(f"optimizer.{key}.")
                for name, part in self.model.flat.named(restored[key]).items():
                    part.copy_(saved[name])
            self.optimizer.state[self.parameter] = restored
        checkpoints.restore_random_state(state)
        self.state = state


class _Journal:
    """What is written and told of a training, by the processes that do so."""

    def __init__(self, trainer: Trainer) -> None:
        self._writes = trainer.world.writes
        self._metrics = MetricsWriter(Path(trainer.job.metrics), trainer.state.step) if self._writes else None

    def metrics(self, **fields: float) -> None:
        """A line of the metrics file."""
        if self._metrics is not None:
            self._metrics.write(**fields)

    def report(self, event: TrainingEvent) -> None:
        """Report an event to the process that started the engine."""
        if self._writes:
            events.emit(event)

    def checkpoint(self, job: TrainJob, state: State) -> None:
        """A checkpoint, on the disk of each machine."""
        if self._writes:
            checkpoints.save(job, state)


def train(job: TrainJob) -> None:
    """Trains the adapter of `job` and writes it.

    Raises:
        TrainingError: see `Trainer.step` and `checkpoints.newest`; or the checkpoint is behind the job's end; or other
            processes train something else.
    """
    world = World(best_device())
    alike = ("epochs", "early_stopping", "sharded")  # who differs here waits for the others for ever
    world.require_same({**job.identity(), **{name: getattr(job, name) for name in alike}})
    state = _newest(job, world)
    trainer = Trainer(job, world)
    if state is not None:
        if state.step > trainer.length.steps:
            raise TrainingError(
                f"the checkpoint is at step {state.step}, but --epochs {job.epochs} ends at {trainer.length.steps}",
                "Give more --epochs, or train from scratch without --use-checkpoint.",
            )
        trainer.restore(state)
    elif world.writes:
        checkpoints.clear(job)
    known = trainer.state.halvings
    more = world.longest(job.halvings)[len(known) :]  # memory may have run out on one machine of several
    trainer.state.halvings = [*known, *(max(each, trainer.state.step) for each in more)]
    journal = _Journal(trainer)
    journal.report(TrainingBegins(trainer.state.step, trainer.state.halvings))
    if state is not None:
        journal.report(Note(f"resuming from step {state.step}"))
    stopped = _run(trainer, journal)
    if world.writes:
        _save(trainer)
    result = TrainingResult(
        steps=trainer.state.step,
        stopped_early=stopped,
        device=trainer.device,
        processes=world.size,
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        kernels=trainer.model.kernels,
    )
    journal.report(result)
    world.close()


def _newest(job: TrainJob, world: World) -> State | None:
    """The newest checkpoint that any machine has. Several processes may have been restarted: they always look."""
    looks = world.writes and (job.resume or world.size > 1)
    own = checkpoints.newest(job) if looks else None
    found: State | None = world.newest(own.step if own else None, lambda: own)
    return found


def _run(trainer: Trainer, journal: _Journal) -> bool:
    """All epochs from where the trainer stands; returns whether the training stopped early."""
    job = trainer.job
    stopped = _has_stopped(trainer)  # before the process that wrote the checkpoint could finish
    if trainer.state.step == 0:
        _evaluate(trainer, journal)
    first_epoch, first_step = divmod(trainer.state.step, max(1, trainer.length.steps_in_epoch))
    for epoch in range(first_epoch, 0 if stopped else job.epochs):
        _train_epoch(trainer, journal, epoch, first_step if epoch == first_epoch else 0)
        _evaluate(trainer, journal)
        journal.checkpoint(job, trainer.snapshot())
        stopped = _has_stopped(trainer)
        if stopped:
            journal.report(Note(f"stopped early after epoch {epoch + 1}: the held-out loss no longer improves"))
            break
    return stopped


def _save(trainer: Trainer) -> None:
    """Writes the adapter: the last, or the best where the training waits for one."""
    job = trainer.job
    best = trainer.state.part("best.") if job.early_stopping else {}
    save_adapter(
        Path(job.adapter),
        best or lora.adapter_tensors(trainer.adapters),
        base_name=job.base_name,
        rank=job.lora_rank,
        alpha=job.lora_alpha,
        dropout=job.lora_dropout,
    )


def _has_stopped(trainer: Trainer) -> bool:
    """Whether the held-out loss has not improved for as long as the job waits."""
    wait = trainer.job.early_stopping
    return bool(wait) and trainer.state.evaluations_since_best >= wait


def _train_epoch(trainer: Trainer, journal: _Journal, epoch: int, first: int) -> None:
    job = trainer.job
    size = job.batch_size * job.gradient_accumulation
    for indices in epoch_steps(len(trainer.tokens), epoch, job.seed, size, first):
        started = time.perf_counter()
        rate = job.learning_rate * learning_rate_factor(
            job.scheduler_type, trainer.state.step, trainer.length.steps, trainer.length.warmup_steps
        )
        random_state = checkpoints.random_state()
        try:
            loss = trainer.step(indices, rate)
        except TrainingError:
            before = trainer.snapshot()
            before.tensors |= random_state
            journal.checkpoint(job, before)
            raise
        trainer.state.step += 1
        speed = sum(trainer.tokens.chat_length(index) for index in indices) / (time.perf_counter() - started)
        journal.metrics(
            step=trainer.state.step,
            epoch=round(trainer.state.step / trainer.length.steps_in_epoch, 4),
            loss=loss,
            learning_rate=rate,
            tokens_per_second=round(speed, 1),
            memory_mb=_memory_mb(trainer.device),
            time=round(time.time(), 3),
        )
        journal.report(StepDone(trainer.state.step, trainer.length.steps, loss, speed))
        in_epoch = trainer.state.step % trainer.length.steps_in_epoch
        if job.checkpoint_steps and trainer.state.step % job.checkpoint_steps == 0 and in_epoch:
            journal.checkpoint(job, trainer.snapshot())


def _evaluate(trainer: Trainer, journal: _Journal) -> None:
    loss = trainer.evaluate()
    if loss is None:
        return
    state = trainer.state
    journal.metrics(step=state.step, held_out_loss=loss, time=round(time.time(), 3))
    journal.report(EvaluationDone(state.step, loss))
    if state.best_loss is None or loss < state.best_loss:
        state.best_loss, state.evaluations_since_best = loss, 0
        if trainer.job.early_stopping:
            best = {f"best.{name}": each for name, each in lora.adapter_tensors(trainer.adapters).items()}
            state.tensors = {**state.tensors, **best}
    else:
        state.evaluations_since_best += 1


def _memory_mb(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    import psutil

    return int(psutil.Process().memory_info().rss) >> 20
