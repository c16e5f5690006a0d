"""train: tokens → adapter, by an engine that is started as a process of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kolotune.base_models.catalog import canonical_name
from kolotune.engines.job import TrainJob, event_of
from kolotune.engines.native.environment import ENVIRONMENT
from kolotune.engines.torchtune import architecture, environment, plan
from kolotune.engines.training_length import automatic_batch_size
from kolotune.foundation import errors, hardware
from kolotune.foundation.config import Config, option_names, plain_values, stage_options
from kolotune.foundation.errors import ArtifactError, KolotuneError, TrainingError
from kolotune.foundation.reporter import Progress, Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.layout import TRAIN_TOKENS
from kolotune.run_folder.memory_backoff import read_memory_backoff, write_memory_backoff
from kolotune.run_folder.stage import Context
from kolotune.runners import local, memory_kills
from kolotune.weights.model_shape import DTYPE_BYTES, read_shape

NAME = "train"
DOING = "training the adapter"
_FIRST = ("first_held_out_loss",)  # facts that a training which goes on does not tell anew
_MOST_FOR_THE_BASE = 0.6  # the rest is for adapters, activations and the optimizer


def options(config: Config) -> JsonObject:
    """See `records.Stage`; of torchtune's environment what it is made from, which is known before it is made."""
    chosen = stage_options(config, NAME)
    if config.engine == "torchtune":
        del chosen["compile"]
        chosen["torchtune_environment"] = environment.fingerprint()
    return chosen


def inputs(context: Context) -> dict[str, Path]:
    """See `records.Stage`."""
    return {"the prepared chats": context.run.prepared, "the base model": context.base}


def outputs(context: Context) -> list[Path]:
    """See `records.Stage`."""
    return [context.run.adapter]


def packages() -> Sequence[str]:
    """See `records.Stage`."""
    return ("torch", "transformers")


def preflight(context: Context, reporter: Reporter) -> None:
    """The engine must be there, and torchtune able to do what is asked."""
    if context.config.engine == "torchtune":
        plan.check(context.config, architecture.read(context.base))
    _check_packages(context.config)
    if context.config.engine == "torchtune":
        environment.ensure(reporter.doing)


def _check_packages(config: Config) -> None:
    import importlib.util

    bitsandbytes = config.load_in_4bit and config.engine == "native"
    needed = ["torch", "transformers"] + (["bitsandbytes"] if bitsandbytes else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "four-bit" if missing == ["bitsandbytes"] else "local"
        raise TrainingError(f"training needs {', '.join(missing)}", f"Install it: pip install 'kolotune[{extra}]'.")


def make_job(context: Context) -> TrainJob:
    """The job for the engine, with the hashes of what it reads."""
    hasher, run, config = context.hasher, context.run, context.config
    chosen = plain_values(config, [name for name in option_names(stage=NAME) if name != "engine"])
    chosen["compile"] = config.engine == "native" and config.compile == "on"
    if config.batch_size is None:
        chosen["batch_size"] = automatic_batch_size(run.prepared / TRAIN_TOKENS)
    return TrainJob(
        base_model=str(context.base),
        base_name=canonical_name(config.base_model),
        base_sha256=hasher.of(context.base),
        data=str(run.prepared),
        data_sha256=hasher.of(run.prepared),
        adapter=str(run.adapter),
        checkpoints=str(run.checkpoints),
        metrics=str(run.metrics),
        resume=config.use_checkpoint,
        nproc=config.nproc,
        nnodes=config.nnodes,
        rdzv=config.rdzv,
        sharded=is_sharded(config, context.base),
        checkpoint_steps=config.checkpoint_steps,
        **chosen,  # type: ignore[arg-type]  # the fields of Config have the types of those of TrainJob
    )


def is_sharded(config: Config, base: Path) -> bool:
    """Whether the base is parted over the processes: as asked for, or where one in each would not fit.

    Several processes of torchtune always part it.
    """
    several = config.nproc * config.nnodes > 1
    if config.engine == "torchtune":
        return several
    if config.sharding != "auto" or config.load_in_4bit or not several:
        return config.sharding == "on"
    size = read_shape(base).weight_count * DTYPE_BYTES[config.dtype]
    return size * config.nproc > hardware.memory_for_processes(config.nproc) * _MOST_FOR_THE_BASE


def run(context: Context, reporter: Reporter) -> JsonObject:
    """Starts the engine and shows its progress; raises its errors in its words."""
    if not context.run.prepared.is_dir():
        raise ArtifactError(f"{context.run.root}: the chats are not prepared", "Run `kolotune prepare` first.")
    job = make_job(context)
    job = dataclasses.replace(job, halvings=read_memory_backoff(context.run, job.identity()))
    if context.config.batch_size is None:
        reporter.note(f"batches of {job.batch_size} chats (--batch-size)")
    if job.sharded:
        reporter.note(f"the base is parted over {job.nproc * job.nnodes} processes (--sharding)")
    facts: dict[str, Any] = {}
    while True:
        events, shortage = _train(job, context, reporter)
        facts |= {name: value for name, value in events.facts.items() if name not in _FIRST or name not in facts}
        if not shortage:
            break
        job = _with_less_memory(job, events, shortage, context.config, reporter)
    if events.halvings:
        facts["halved_from"] = ",".join(map(str, events.halvings))
    return facts


def _train(job: TrainJob, context: Context, reporter: Reporter) -> tuple[_Events, str]:
    """Starts the engine once; returns what it told, and how memory ran out, if that is what ended it."""
    job.write(context.run.job)
    log, kills_before = context.run.log(NAME), hardware.kills_for_memory()
    with reporter.progress("training") as progress:
        events = _Events(
            reporter,
            progress,
            lambda halvings: write_memory_backoff(context.run, halvings, job.identity()),
            several=job.nproc * job.nnodes > 1,
        )
        argv = local.python(f"kolotune.engines.{context.config.engine}", str(context.run.job))
        try:
            code = local.run(argv, log=log, env=ENVIRONMENT, on_line=events, ends_with_parent=True)
        except _MemoryRanOut:
            return events, "memory ran out"
    if events.error is not None:
        raise events.error
    if events.out_of_memory:
        return events, "memory ran out"
    if shortage := memory_kills.out_of_memory_reason(code, kills_before):
        return events, shortage
    if code != 0:
        raise TrainingError(f"the training process ended with code {code}: {local.last_lines(log)}", f"See {log}.")
    return events, ""


def _with_less_memory(job: TrainJob, events: _Events, shortage: str, config: Config, reporter: Reporter) -> TrainJob:
    """The job that goes on from the last checkpoint with half as many chats at once.

    Raises:
        TrainingError: there is nothing to halve, or it would not help: what to change is told.
    """
    batch = job.batch_size >> len(events.halvings)
    if not events.begun or batch <= 1:
        changes = ["lower --max-seq-length or --lora-rank", "take a smaller --base-model"]
        if not config.load_in_4bit:
            changes.insert(1, "add --load-in-4bit (on a GPU)")
        if batch > 1:
            changes.insert(0, "halve --batch-size and double --gradient-accumulation (same result)")
        raise TrainingError(
            shortage, f"Free some memory and go on with --use-checkpoint; or train anew: {', '.join(changes)}."
        )
    reporter.warning(
        f"{shortage} in step {events.step + 1}: the batch is halved from {batch} to {batch // 2} and the accumulation "
        "doubled, so that a step stays what it is; going on from the last checkpoint"
    )
    return dataclasses.replace(job, resume=True, halvings=[*events.halvings, 0])


class _MemoryRanOut(Exception):
    """Ends several processes at once: they would start each other again, with as many chats as before."""


class _Events:
    """Takes the engine's events out of its output."""

    def __init__(
        self, reporter: Reporter, progress: Progress, on_halvings: Callable[[list[int]], None], *, several: bool
    ) -> None:
        self._reporter, self._progress, self._several = reporter, progress, several
        self._on_halvings = on_halvings
        self.error: KolotuneError | None = None
        self.facts: dict[str, Any] = {}
        self.begun = self.out_of_memory = False
        self.step = 0
        self.halvings: list[int] = []

    def __call__(self, line: str) -> bool:
        event = event_of(line)
        if event is None:
            return False
        kind = event.pop("event")
        if kind == "begins":
            self.begun, self.step, self.halvings = True, int(event["step"]), list(event["halvings"])
            if self.halvings:
                self._on_halvings(self.halvings)
        elif kind == "out_of_memory":
            self.out_of_memory = True
            if self._several:
                raise _MemoryRanOut
        elif kind == "step":
            self.step = int(event["step"])
            self.facts["final_loss"] = event["loss"]
            self._progress.update(
                event["step"],
                event["steps"],
                loss=round(float(event["loss"]), 4),
                tokens_per_second=round(event["tokens_per_second"]),
            )
        elif kind == "evaluation":
            self.facts.setdefault("first_held_out_loss", event["held_out_loss"])
            self.facts["held_out_loss"] = event["held_out_loss"]
            self._reporter.note(f"held-out loss after step {event['step']}: {event['held_out_loss']:.4f}")
        elif kind == "note":
            self._reporter.note(str(event["text"]))
        elif kind == "result":
            self.facts |= event
        elif kind == "error":
            raised = getattr(errors, str(event["kind"]), TrainingError)
            self.error = raised(str(event["cause"]), str(event["hint"]))
            if self._several:  # or they would be started again, to fail again
                raise self.error
        return True
