"""Starts the recipe in torchtune's environment, and reports its events as kolotune's."""

from __future__ import annotations

from pathlib import Path

from kolotune.foundation import hardware, typed_storage
from kolotune.foundation.errors import KolotuneError, TrainingError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.layout import TRAIN_TOKENS
from kolotune.runners import child_process, local, memory_kills
from kolotune.weights.weight_files import weight_files

from .. import events, torchrun
from ..adapter_folder import AdapterContent, save_adapter
from ..events import EvaluationDone, StepDone, TrainingBegins, TrainingNote, TrainingResult
from ..job import TrainJob
from ..metrics import keep_metrics
from ..training_length import TrainingLength, count_chats
from . import architecture, environment, recipe_checkpoints, recipe_config
from .architecture import Llama
from .environment import Environment
from .recipe_checkpoints import RecipeCheckpoint
from .recipe_events import RECIPE_EVENTS, CheckpointSaved, ProcessesRestarted, ProcessLost, RecipeError, RecipeStarted

_INSIDE = Path(__file__).with_name("inside")
_RECIPE = "kolotune_recipe"


def train(job: TrainJob) -> None:
    """Train the adapter of `job` with torchtune and write it.

    Raises:
        KolotuneError: torchtune can't do what the job asks for, can't be installed, or training stopped.
        MemoryError: memory ran out.
    """
    shape = architecture.read(Path(job.base_model))
    recipe_config.check(job, shape)
    length = training_length(job)
    checkpoint = recipe_checkpoints.newest(job) if job.resume else None
    if checkpoint is not None and checkpoint.epoch > job.epochs:
        raise TrainingError(
            f"the checkpoint is at epoch {checkpoint.epoch}, but --epochs is {job.epochs}",
            "Give more --epochs, or train from scratch without --use-checkpoint.",
        )
    installed = environment.ensure(lambda text: events.emit(TrainingNote(text)))
    if checkpoint is None:
        recipe_checkpoints.clear(job)
    _report_differences(job, shape, length)
    backoff_steps = resumed_backoff(job, checkpoint)
    listener = _RecipeListener(job)
    # With several machines the recipe runs anyway: another machine may lack the last checkpoint.
    if checkpoint is not None and checkpoint.epoch == job.epochs and job.nnodes == 1:
        keep_metrics(Path(job.metrics), checkpoint.step)
        listener.report_start(checkpoint.epoch, checkpoint.step, backoff_steps)
    else:
        _run_recipe(job, make_task(job, shape, length, backoff_steps), installed, listener)
        checkpoint = recipe_checkpoints.newest(job)
    if checkpoint is None or checkpoint.epoch != job.epochs:
        raise TrainingError("torchtune ended without the checkpoint of the last epoch", f"See {_log(job)}.")
    content = AdapterContent(
        checkpoint.adapter(),
        base_name=job.base_name,
        rank=job.lora_rank,
        alpha=job.lora_alpha,
        dropout=job.lora_dropout,
    )
    save_adapter(Path(job.adapter), content)
    started = listener.started
    device, processes = (started.device, started.processes) if started else (None, None)
    events.emit(TrainingResult(checkpoint.step, stopped_early=False, device=device, processes=processes))


def training_length(job: TrainJob) -> TrainingLength:
    """Return the length of the training that `job` describes.

    Raises:
        TrainingError: the prepared tokens are damaged.
    """
    chats, _ = count_chats(Path(job.data) / TRAIN_TOKENS)
    return TrainingLength.of(chats, job.batch_size, job.gradient_accumulation, job.epochs, job.warmup_steps)


def _report_differences(job: TrainJob, shape: Llama, length: TrainingLength) -> None:
    """Report where torchtune does not do what one might expect."""
    name = recipe_config.config_name(shape)
    if name is not None:
        events.emit(TrainingNote(f"torchtune's own config: {name}; it keeps the base in 4 bits while training"))
    else:
        events.emit(TrainingNote("torchtune has no config for this model; one was made from its config.json"))
    if job.checkpoint_steps and length.steps_in_epoch > job.checkpoint_steps:
        events.emit(TrainingNote("torchtune writes a checkpoint after each epoch only; checkpoint-steps has no effect"))
    if job.learning_rate and 0 < length.steps <= length.warmup_steps:
        reached = job.learning_rate * (length.steps - 1) / length.warmup_steps
        text = (
            f"the warmup of {length.warmup_steps} steps is longer than the training ({length.steps} steps): "
            f"the learning rate only reaches {reached:.2g} of {job.learning_rate:.2g}; see --warmup-steps"
        )
        events.emit(TrainingNote(text))


def resumed_backoff(job: TrainJob, checkpoint: RecipeCheckpoint | None) -> list[int]:
    """Return the steps at which memory ran out: those that the checkpoint knows, and the job's newer ones."""
    known, step = (checkpoint.halvings, checkpoint.step) if checkpoint else ([], 0)
    return [*known, *(max(first, step) for first in job.halvings[len(known) :])]


def make_task(job: TrainJob, shape: Llama, length: TrainingLength, backoff_steps: list[int]) -> JsonObject:
    """Return the recipe's task. Paths are beside torchtune's config, never in it."""
    return {
        "config_name": recipe_config.config_name(shape),
        "config": recipe_config.make_config(job, shape, length.warmup_steps),
        "halvings": backoff_steps,
        "base_model": job.base_model,
        "weight_files": [path.name for path in weight_files(Path(job.base_model))],
        "tied": shape.tied,
        "four_bit": recipe_config.four_bit(job, shape),
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
        "torchrun": torchrun.arguments(job, _RECIPE, str(_task_file(job))) if job.processes > 1 else None,
    }


def _run_recipe(job: TrainJob, task: JsonObject, installed: Environment, listener: _RecipeListener) -> None:
    folder = _work_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    typed_storage.write(_task_file(job), task)
    _log(job).unlink(missing_ok=True)
    kills_before = hardware.kills_for_memory()
    # The recipe sees only that folder of kolotune. It needs no network, and progress bars would fill the log.
    env = {"PYTHONPATH": str(_INSIDE), "PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if job.processes > 1:
        env |= {**torchrun.variables(job), "PYTHONSAFEPATH": "1"}  # like -P, for the processes that torchrun starts
    code = local.run(
        [str(installed.python), "-P", "-m", _RECIPE, str(_task_file(job))],
        log=_log(job),
        env=env,
        cwd=folder,
        on_line=listener,
        ends_with_parent=True,
    )
    if listener.error is not None:
        raise listener.error
    if shortage := memory_kills.out_of_memory_reason(code, kills_before):
        raise MemoryError(shortage)
    if code != 0:
        reason = listener.lost or local.last_lines(_log(job))
        raise TrainingError(f"torchtune ended with code {code}: {reason}", f"See {_log(job)}.")


def _work_folder(job: TrainJob) -> Path:
    """Return the folder beside the checkpoints for the recipe's task, its config for torchtune, and its log."""
    return Path(job.checkpoints).with_name("torchtune")


def _task_file(job: TrainJob) -> Path:
    return _work_folder(job) / "task.json"


def _log(job: TrainJob) -> Path:
    return _work_folder(job) / "torchtune.log"


class _RecipeListener:
    """Finds the recipe's events in its output and passes them on as kolotune's.

    An error of one of several processes is raised at once, which ends them all: torchrun would restart them, and they
    would fail again.
    """

    def __init__(self, job: TrainJob) -> None:
        self._job = job
        self._kills_before = hardware.kills_for_memory(own=True)
        self.error: KolotuneError | MemoryError | None = None
        self.lost = ""
        self.started: RecipeStarted | None = None

    def __call__(self, line: str) -> bool:
        found = child_process.event_in(line)
        if found is None:
            return False
        name, fields = found
        if name in RECIPE_EVENTS:
            self._handle(typed_storage.convert(RECIPE_EVENTS[name], fields))
        return True

    def _handle(self, event: object) -> None:
        match event:
            case RecipeStarted():
                self.started = event
                self.report_start(event.epoch, event.step, event.halvings)
            case StepDone() | EvaluationDone():
                events.emit(event)
            case CheckpointSaved():
                recipe_checkpoints.prune(self._job)
            case ProcessLost():
                self.lost = event.text
            case ProcessesRestarted() if hardware.kills_for_memory(own=True) != self._kills_before:
                raise MemoryError("the kernel killed a training process because memory ran out")
            case RecipeError():
                self.error = self._as_exception(event)
                if self._job.processes > 1:
                    raise self.error

    def report_start(self, epoch: int, step: int, backoff_steps: list[int]) -> None:
        """Report that training starts, or resumes, also after a process was lost."""
        events.emit(TrainingBegins(step, backoff_steps))
        if step:
            events.emit(TrainingNote(f"resuming from step {step} (epoch {epoch})"))

    def _as_exception(self, error: RecipeError) -> TrainingError | MemoryError:
        log = _log(self._job)
        match error.kind:
            case "memory":
                return MemoryError(error.text)
            case "not finite":
                return TrainingError(
                    error.text,
                    "Lower --learning-rate and train from scratch. The checkpoint of the last whole epoch is kept. "
                    f"See {log}.",
                )
            case "disagreement":
                return TrainingError(
                    f"the machines that train together disagree about {error.text}",
                    "Give all of them the same chats, the same base model and the same options.",
                )
            case _:
                return TrainingError(f"torchtune stopped: {error.text}", f"See {log}.")
