"""The driver: starts the recipe in torchtune's environment and tells what it answers in kolotune's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kolotune.foundation import hardware, typed_storage
from kolotune.foundation.errors import KolotuneError, TrainingError
from kolotune.run_folder.layout import TRAIN_TOKENS
from kolotune.runners import local, memory_kills
from kolotune.weights.weight_files import weight_files

from .. import torchrun
from ..adapter_folder import save_adapter
from ..job import TrainJob, emit, event_of
from ..metrics import begin
from ..training_length import TrainingLength, count_chats
from . import architecture, checkpoints, environment, plan
from .architecture import Llama
from .environment import Environment

_INSIDE = Path(__file__).with_name("inside")
_RECIPE = "kolotune_recipe"


def length_of(job: TrainJob) -> TrainingLength:
    """Compute the length of the training that `job` describes.

    Raises:
        TrainingError: the prepared tokens are damaged.
    """
    chats, _ = count_chats(Path(job.data) / TRAIN_TOKENS)
    return TrainingLength.of(chats, job.batch_size, job.gradient_accumulation, job.epochs, job.warmup_steps)


def train(job: TrainJob) -> None:
    """Trains the adapter of `job` with torchtune and writes it.

    Raises:
        KolotuneError: torchtune can't do what is asked, its environment can't be had, or training stopped.
        MemoryError: memory ran out.
    """
    shape = architecture.read(Path(job.base_model))
    plan.check(job, shape)
    length = length_of(job)
    found = checkpoints.newest(job) if job.resume else None
    if found is not None and found.epoch > job.epochs:
        raise TrainingError(
            f"the checkpoint is at epoch {found.epoch}, and --epochs {job.epochs} ends before it",
            "Give more epochs, or leave --use-checkpoint out to train anew.",
        )
    place = environment.ensure(lambda text: emit("note", text=text))
    if found is None:
        checkpoints.clear(job)
    _say_what_differs(job, shape, length)
    halvings = halvings_of(job, found)
    answers = _Answers(job)
    # Of several machines another one may have less than this.
    if found is not None and found.epoch == job.epochs and job.nnodes == 1:
        begin(Path(job.metrics), found.step)
        answers.begins(found.epoch, found.step, halvings)
    else:
        _run_recipe(job, task_of(job, shape, length, halvings), place, answers)
        found = checkpoints.newest(job)
    if found is None or found.epoch != job.epochs:
        raise TrainingError("torchtune ended without the checkpoint of the last epoch", f"See {_log(job)}.")
    save_adapter(
        Path(job.adapter),
        found.adapter(),
        base_name=job.base_name,
        rank=job.lora_rank,
        alpha=job.lora_alpha,
        dropout=job.lora_dropout,
    )
    emit("result", steps=found.step, stopped_early=False, **answers.facts)


def _say_what_differs(job: TrainJob, shape: Llama, length: TrainingLength) -> None:
    """What torchtune does otherwise than one might expect."""
    name = plan.config_name(shape)
    if name is not None:
        emit("note", text=f"torchtune's own config: {name}; the base is kept in 4 bits while training")
    else:
        emit("note", text="torchtune has no config for this model: one was made from its config.json")
    if job.checkpoint_steps and length.steps_in_epoch > job.checkpoint_steps:
        emit("note", text="torchtune writes a checkpoint after each epoch only; checkpoint-steps does not count")
    if job.learning_rate and 0 < length.steps <= length.warmup_steps:
        reached = job.learning_rate * (length.steps - 1) / length.warmup_steps
        emit(
            "note",
            text=f"the warmup of {length.warmup_steps} steps is longer than the training ({length.steps} steps): "
            f"the learning rate only reaches {reached:.2g} of {job.learning_rate:.2g}; see --warmup-steps",
        )


def halvings_of(job: TrainJob, found: checkpoints.Checkpoint | None) -> list[int]:
    """From which steps on half as many chats are computed at once: what the checkpoint knows, and what came since."""
    known, step = (found.halvings, found.step) if found else ([], 0)
    return [*known, *(max(each, step) for each in job.halvings[len(known) :])]


def task_of(job: TrainJob, shape: Llama, length: TrainingLength, halvings: list[int]) -> dict[str, Any]:
    """What the recipe is told. Paths stand beside torchtune's config, never in it."""
    return {
        "config_name": plan.config_name(shape),
        "config": plan.config_of(job, shape, length.warmup_steps),
        "halvings": halvings,
        "base_model": job.base_model,
        "weight_files": [path.name for path in weight_files(Path(job.base_model))],
        "tied": shape.tied,
        "four_bit": plan.four_bit(job, shape),
        "heads": {
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "dim": shape.embed_dim,
            "head_dim": shape.head_dim,
        },
        "data": job.data,
        "seed": job.seed,
        "checkpoints": job.checkpoints,
        "metrics": job.metrics,
        "identity": job.identity(),
        "torchrun": torchrun.arguments(job, _RECIPE, str(_task_file(job))) if _are_several(job) else None,
    }


def _are_several(job: TrainJob) -> bool:
    return job.nproc * job.nnodes > 1


def _run_recipe(job: TrainJob, task: dict[str, Any], place: Environment, answers: _Answers) -> None:
    folder = _work_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    typed_storage.write(_task_file(job), task)
    _log(job).unlink(missing_ok=True)
    kills_before = hardware.kills_for_memory()
    # Of kolotune it sees that one folder; it needs no network, and progress bars would fill the log.
    env = {"PYTHONPATH": str(_INSIDE), "PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if _are_several(job):
        env |= {**torchrun.variables(job), "PYTHONSAFEPATH": "1"}  # as -P, for those that torchrun starts
    code = local.run(
        [str(place.python), "-P", "-m", _RECIPE, str(_task_file(job))],
        log=_log(job),
        env=env,
        cwd=folder,
        on_line=answers,
        ends_with_parent=True,
    )
    if answers.error is not None:
        raise answers.error
    if shortage := memory_kills.out_of_memory_reason(code, kills_before):
        raise MemoryError(shortage)
    if code != 0:
        said = answers.lost or local.last_lines(_log(job))
        raise TrainingError(f"torchtune ended with code {code}: {said}", f"See {_log(job)}.")


def _work_folder(job: TrainJob) -> Path:
    """Beside the checkpoints: what the recipe is told, the config that it made of it, and its log."""
    return Path(job.checkpoints).with_name("torchtune")


def _task_file(job: TrainJob) -> Path:
    return _work_folder(job) / "task.json"


def _log(job: TrainJob) -> Path:
    return _work_folder(job) / "torchtune.log"


class _Answers:
    """Takes the recipe's events out of its output, and hands them on.

    Where there are several processes an error of one is raised at once, which ends them all: torchrun would start them
    again, to fail again.
    """

    def __init__(self, job: TrainJob) -> None:
        self._job = job
        self._kills_before = hardware.kills_for_memory(own=True)
        self.error: KolotuneError | MemoryError | None = None
        self.lost = ""
        self.facts: dict[str, Any] = {}

    def __call__(self, line: str) -> bool:
        event = event_of(line)
        if event is None:
            return False
        kind = event.pop("event")
        if kind == "started":
            self.facts |= {"device": event["device"], "processes": event["processes"]}
            self.begins(event["epoch"], event["step"], event["halvings"])
        elif kind in ("step", "evaluation"):
            emit(kind, **event)
        elif kind == "checkpoint":
            checkpoints.prune(self._job)
        elif kind == "lost":
            self.lost = event["text"]
        elif kind == "again" and hardware.kills_for_memory(own=True) != self._kills_before:
            raise MemoryError("the kernel killed a training process because memory ran out")
        elif kind == "error":
            self.error = self._in_words(event)
            if _are_several(self._job):
                raise self.error
        return True

    def begins(self, epoch: int, step: int, halvings: list[int]) -> None:
        """Tells where the training stands when its steps begin, or go on after a process was lost."""
        emit("begins", step=step, halvings=halvings)
        if step:
            emit("note", text=f"going on from step {step} (epoch {epoch})")

    def _in_words(self, event: dict[str, Any]) -> TrainingError | MemoryError:
        if event["kind"] == "memory":
            return MemoryError(event["text"])
        if event["kind"] == "not finite":
            return TrainingError(
                event["text"],
                "Lower --learning-rate and train anew; the last whole epoch is kept among the checkpoints. "
                f"See {_log(self._job)}.",
            )
        if event["kind"] == "disagreement":
            return TrainingError(
                f"the machines that train together disagree about {event['text']}",
                "Give all of them the same chats, the same base model and the same options.",
            )
        return TrainingError(f"torchtune stopped: {event['text']}", f"See {_log(self._job)}.")
