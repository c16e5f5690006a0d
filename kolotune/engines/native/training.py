"""The training loop: epochs, evaluations, checkpoints, and what is reported of them."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from kolotune.foundation.errors import TrainingError
from kolotune.foundation.hardware import best_device

from .. import events
from ..adapter_folder import AdapterContent, save_adapter
from ..events import EvaluationDone, StepDone, TrainingBegins, TrainingEvent, TrainingNote, TrainingResult
from ..job import TrainJob
from ..metrics import MetricsWriter
from ..prepared_tokens import epoch_steps
from . import checkpointer, expert_lora, lora
from .checkpointer import TrainingState
from .learning_rate import learning_rate_factor
from .lora_settings import LoraSettings
from .preference_trainer import PreferenceTrainer
from .process_group import ProcessGroup
from .starting_matrices import added_to_base
from .trainer import Trainer


class _TrainingJournal:
    """Writes metrics and checkpoints and reports events, in the processes that do so."""

    def __init__(self, trainer: Trainer) -> None:
        self._writes = trainer.group.writes
        self._metrics = MetricsWriter(Path(trainer.job.metrics), trainer.state.step) if self._writes else None

    def metrics(self, **fields: float) -> None:
        """Append a line to the metrics file."""
        if self._metrics is not None:
            self._metrics.write(**fields)

    def report(self, event: TrainingEvent) -> None:
        """Report an event to the process that started the engine."""
        if self._writes:
            events.emit(event)

    def checkpoint(self, job: TrainJob, state: TrainingState) -> None:
        """Write a checkpoint, on the disk of each machine."""
        if self._writes:
            checkpointer.save(job, state)


def train(job: TrainJob) -> None:
    """Train the adapter of `job` and write it.

    Raises:
        TrainingError: see `Trainer.step` and `checkpointer.newest`; also if the checkpoint is beyond the job's end, or
            the processes have different settings.
    """
    group = ProcessGroup(best_device())
    same = ("epochs", "early_stopping", "sharded")  # processes that differ here would wait forever
    group.require_same({**job.identity(), **{name: getattr(job, name) for name in same}})
    state = _newest(job, group)
    trainer = PreferenceTrainer(job, group) if job.preference else Trainer(job, group)
    if state is not None:
        if state.step > trainer.length.steps:
            raise TrainingError(
                f"the checkpoint is at step {state.step}, but --epochs {job.epochs} ends at {trainer.length.steps}",
                "Give more --epochs, or train from scratch without --use-checkpoint.",
            )
        trainer.restore(state)
    elif group.writes:
        checkpointer.clear(job)
    known = trainer.state.halvings
    more = group.longest(job.halvings)[len(known) :]  # memory may have run out on one machine of several
    trainer.state.halvings = [*known, *(max(each, trainer.state.step) for each in more)]
    journal = _TrainingJournal(trainer)
    journal.report(TrainingBegins(trainer.state.step, trainer.state.halvings))
    if trainer.model.reason_slow:
        journal.report(TrainingNote(f"transformers computes this model, which is slower: {trainer.model.reason_slow}"))
    if state is not None:
        journal.report(TrainingNote(f"resuming from step {state.step}"))
    trainer.prepare(lambda text: journal.report(TrainingNote(text)))
    stopped = _run(trainer, journal)
    if group.writes:
        _save(trainer)
    result = TrainingResult(
        steps=trainer.state.step,
        stopped_early=stopped,
        device=trainer.device,
        processes=group.size,
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        kernels=trainer.model.kernels,
    )
    journal.report(result)
    group.close()


def _newest(job: TrainJob, group: ProcessGroup) -> TrainingState | None:
    """Return the newest checkpoint of any machine. Several processes may have been restarted, so they always look."""
    looks = group.writes and (job.resume or group.size > 1)
    own = checkpointer.newest(job) if looks else None
    found: TrainingState | None = group.newest(own.step if own else None, lambda: own)
    return found


def _run(trainer: Trainer, journal: _TrainingJournal) -> bool:
    """Train the epochs that are left; return whether the training stopped early."""
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
            what = "loss" if trainer.accuracy is None else "accuracy"
            journal.report(
                TrainingNote(f"stopped early after epoch {epoch + 1}: the held-out {what} no longer improves")
            )
            break
    return stopped


def _save(trainer: Trainer) -> None:
    """Write the adapter: the last one, or with early stopping the best one."""
    job = trainer.job
    best = trainer.state.tensors_under("best.") if job.early_stopping else {}
    tensors, settings = best or lora.adapter_tensors(trainer.adapters), LoraSettings.of(job)
    if settings.initial is not None:
        tensors, settings = added_to_base(tensors, trainer.adapters), settings.of_twice_the_rank()
    content = AdapterContent(
        tensors,
        base_name=job.base_name,
        rank=settings.rank,
        alpha=settings.alpha,
        rank_stabilised=job.use_rslora,
        has_magnitudes=job.use_dora,
        dropout=job.lora_dropout,
        ranks=settings.ranks,
        alphas=settings.alphas,
        language_model=trainer.model.language_model,
        parameters=expert_lora.target_parameters(trainer.adapters),
        new_tokens=job.new_tokens,
        modules_to_save=trainer.model.saved_names,
        tied_ends=trainer.model.tied_ends,
    )
    save_adapter(Path(job.adapter), content)


def _has_stopped(trainer: Trainer) -> bool:
    """Return whether the held-out loss has not improved in as many evaluations as the job allows."""
    wait = trainer.job.early_stopping
    return bool(wait) and trainer.state.evaluations_since_best >= wait


def _train_epoch(trainer: Trainer, journal: _TrainingJournal, epoch: int, first: int) -> None:
    job = trainer.job
    size = job.batch_size * job.gradient_accumulation
    for indices in epoch_steps(len(trainer.tokens), epoch, job.seed, size, first):
        started = time.perf_counter()
        rate = job.learning_rate * learning_rate_factor(
            job.scheduler_type, trainer.state.step, trainer.length.steps, trainer.length.warmup_steps
        )
        random_state = checkpointer.random_state()
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
            **trainer.figures,
            time=round(time.time(), 3),
        )
        journal.report(StepDone(trainer.state.step, trainer.length.steps, loss, speed))
        in_epoch = trainer.state.step % trainer.length.steps_in_epoch
        if job.checkpoint_steps and trainer.state.step % job.checkpoint_steps == 0 and in_epoch:
            journal.checkpoint(job, trainer.snapshot())


def _evaluate(trainer: Trainer, journal: _TrainingJournal) -> None:
    loss = trainer.evaluate()
    if loss is None:
        return
    state = trainer.state
    journal.metrics(step=state.step, held_out_loss=loss, **trainer.figures, time=round(time.time(), 3))
    journal.report(EvaluationDone(state.step, loss, trainer.accuracy))
    if state.is_better(loss, trainer.accuracy):
        state.best_loss, state.best_accuracy, state.evaluations_since_best = loss, trainer.accuracy, 0
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
