"""train: tokens → adapter, by an engine that runs as a separate process."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kolotune.base_models.catalog import canonical_name, path_exists
from kolotune.engines import events
from kolotune.engines.engine import get_engine
from kolotune.engines.events import EvaluationDone, OutOfMemory, StepDone, TrainingBegins, TrainingNote, TrainingResult
from kolotune.engines.job import PreferenceSettings, TrainJob
from kolotune.engines.process_environment import ENVIRONMENT
from kolotune.engines.training_length import automatic_batch_size
from kolotune.foundation import hardware, typed_storage
from kolotune.foundation.config import OPTIONS, Config, option_names, plain_values, stage_options
from kolotune.foundation.errors import ArtifactError, ConfigError, TrainingError
from kolotune.foundation.installation import install_command
from kolotune.foundation.objectives import OBJECTIVES, beta_of
from kolotune.foundation.reporter import Progress, Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.layout import TRAIN_TOKENS, RunFolder
from kolotune.run_folder.memory_backoff import read_memory_backoff, write_memory_backoff
from kolotune.run_folder.records import read_record
from kolotune.run_folder.stage import Context
from kolotune.runners import child_process, local, memory_kills
from kolotune.tracking.__main__ import TrackingTask
from kolotune.tracking.follower import Follower, following
from kolotune.tracking.tracker import require_installed
from kolotune.weights import composite_models
from kolotune.weights.starting_adapter import read_starting_adapter
from kolotune.weights.vocabulary import token_count

NAME = "train"
DOING = "training the adapter"
BASE_INPUT, START_INPUT = "the base model", "the adapter to start from"
_PREFERENCE_OPTIONS = tuple(field.name for field in dataclasses.fields(PreferenceSettings))
_FACTS_OF_THE_START = ("first_held_out_loss", "first_held_out_accuracy")  # a resumed training does not replace them


def options(config: Config) -> JsonObject:
    return get_engine(config.engine).record_options(stage_options(config, NAME))


def inputs(context: Context) -> dict[str, Path]:
    start = context.config.start_from
    adapter = {} if start is None else {START_INPUT: start}
    return {"the prepared chats": context.run.prepared, BASE_INPUT: context.base, **adapter}


def outputs(context: Context) -> list[Path]:
    return [context.run.adapter]


def packages() -> Sequence[str]:
    return ("torch", "transformers")


def preflight(context: Context, reporter: Reporter) -> None:
    """Check that the engine can train as configured, and install it where that is needed."""
    check(context)
    if hardware.computes_slowly_in(context.config.dtype):
        reporter.warning(
            "this processor has no instructions for bf16, so that training takes many times as long as in fp32: "
            "leave --dtype out"
        )
    composite_models.check(context.base)
    get_engine(context.config.engine).install(reporter.doing)


def check(context: Context) -> None:
    """Check that the engine can train as configured, without installing anything.

    Raises:
        ConfigError, ModelError: the engine can't do it.
        TrainingError: a package is missing.
    """
    engine = get_engine(context.config.engine)
    engine.check(context.config, context.base)
    if context.config.track != "none":
        require_installed(context.config.track)
    if context.config.start_from is not None:
        _check_same_base(context, context.config.start_from)
    needed = engine.required_packages(context.config, context.base)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "four-bit" if missing == ["bitsandbytes"] else "local"
        raise TrainingError(f"training needs {', '.join(missing)}", f"To install it, {install_command(extra)}.")


def _check_same_base(context: Context, adapter: Path) -> None:
    """Refuse an adapter of another base, as far as its run's record or its config says which one it was."""
    record = read_record(RunFolder(adapter.parent), NAME)
    named, base = read_starting_adapter(adapter).base_name, canonical_name(context.config.base_model)
    if record is not None and adapter.name == context.run.adapter.name:
        is_same = record.inputs.get(BASE_INPUT) == context.hasher.of(context.base)
    else:
        is_same = not named or path_exists(named) or path_exists(base) or canonical_name(named) == base
    if not is_same:
        raise ConfigError(
            f"start-from {adapter}: the adapter was trained on {named or 'another base model'}, not on {base}",
            f"Give --base-model {named}." if named else "Give the base model that it was trained on.",
        )


def make_job(context: Context) -> TrainJob:
    """Return the job for the engine, with the hashes of what it reads."""
    hasher, run, config = context.hasher, context.run, context.config
    engine = get_engine(config.engine)
    chosen = plain_values(config, [name for name in option_names(stage=NAME) if name != "engine"])
    chosen["preference"] = _preference({name: chosen.pop(name) for name in _PREFERENCE_OPTIONS})
    chosen["compile"] = engine.has_compiled_step and config.compile == "on"
    if config.target_parameters in (("auto",), ("none",)):
        chosen["target_parameters"] = []
    if config.batch_size is None:
        chosen["batch_size"] = automatic_batch_size(run.prepared / TRAIN_TOKENS, config.objective)
    return TrainJob(
        base_model=str(context.base),
        base_name=canonical_name(config.base_model),
        base_sha256=hasher.of(context.base),
        data=str(run.prepared),
        data_sha256=hasher.of(run.prepared),
        adapter=str(run.adapter),
        checkpoints=str(run.checkpoints),
        metrics=str(run.metrics),
        reference=str(run.reference),
        start_from="" if config.start_from is None else str(config.start_from),
        start_sha256="" if config.start_from is None else hasher.of(config.start_from),
        resume=config.use_checkpoint,
        nproc=config.nproc,
        nnodes=config.nnodes,
        rdzv=config.rdzv,
        sharded=engine.is_sharded(config, context.base),
        checkpoint_steps=config.checkpoint_steps,
        new_tokens=_new_tokens(context),
        **chosen,  # type: ignore[arg-type]  # the fields of Config have the types of those of TrainJob
    )


def _new_tokens(context: Context) -> list[int]:
    """Return the ids of the run's new tokens, which are the last ones of the base's tokenizer."""
    added = len(context.config.new_token) + len(context.config.new_special_token)
    count = token_count(context.base) if added else 0
    return list(range(count - added, count))


def _preference(options: dict[str, object]) -> PreferenceSettings | None:
    objective, beta = str(options["objective"]), options["beta"]
    if not OBJECTIVES[objective].has_preferences:
        return None
    return PreferenceSettings(**{**options, "beta": beta_of(objective, beta)})  # type: ignore[arg-type]  # as in Config


def run(context: Context, reporter: Reporter) -> JsonObject:
    """Train the adapter; return the facts that the engine reports.

    Where memory runs out, the training resumes with half as many chats at once.

    Raises:
        ArtifactError: the chats are not prepared.
        KolotuneError: the engine's error.
    """
    if not context.run.prepared.is_dir():
        raise ArtifactError(f"{context.run.root}: the chats are not prepared", "Run `kolotune prepare` first.")
    _require_weights_are_used(context)
    job = make_job(context)
    job = dataclasses.replace(job, halvings=read_memory_backoff(context.run, job.identity()))
    if context.config.batch_size is None:
        noun = "packed sequences" if context.config.objective == "text" else "chats"
        reporter.note(f"batches of {job.batch_size} {noun} (--batch-size)")
    if job.sharded:
        reporter.note(f"the base model is sharded over {job.processes} processes (--sharding)")
    facts: JsonObject = {}
    follower = _follower(job, context, reporter)
    with following(follower):
        while True:
            progress, shortage = _start_engine(job, context, reporter, follower)
            facts |= progress.facts | {name: facts[name] for name in _FACTS_OF_THE_START if name in facts}
            if not shortage:
                break
            job = _with_less_memory(job, progress, shortage, context.config, reporter)
    if progress.backoff_steps:
        facts["halved_from"] = ",".join(map(str, progress.backoff_steps))
    if job.new_tokens:
        _add_tokenizer(context)
    return facts


def _add_tokenizer(context: Context) -> None:
    """Put the tokenizer into the adapter's folder, whose new tokens the original base model does not have."""
    for path in sorted(context.run.tokenizer.iterdir()):
        shutil.copyfile(path, context.run.adapter / path.name)


def _require_weights_are_used(context: Context) -> None:
    from kolotune.chats.dataset.row_store import has_weights

    engine, tokens = get_engine(context.config.engine), context.run.prepared / TRAIN_TOKENS
    if not engine.weighs_labels and tokens.is_file() and has_weights(tokens):
        raise ConfigError(
            f"some answers have weights between 0 and 1, which {engine.name} can't train with",
            "Train with --engine native, or read past the weights: --ignore-keys weight.",
        )


@dataclass
class _TrainingProgress:
    """What the engine has reported so far.

    Attributes:
        has_begun: whether training has started or resumed.
        step: steps done.
        backoff_steps: steps at which memory ran out.
        out_of_memory: whether it ran out again.
        facts: for the record.
    """

    has_begun: bool = False
    step: int = 0
    backoff_steps: list[int] = field(default_factory=list)
    out_of_memory: bool = False
    facts: JsonObject = field(default_factory=dict)


class _StopTrainingError(Exception):
    """Ends several processes at once: torchrun would restart them with as many chats as before."""


def _follower(job: TrainJob, context: Context, reporter: Reporter) -> Follower | None:
    """Return what hands the metrics to the tracker; None without one."""
    config, run = context.config, context.run
    if config.track == "none":
        return None
    names = [name for name, option in OPTIONS.items() if option.is_saved]
    task = TrackingTask(
        tracker=config.track,
        project=config.track_project,
        name=run.root.name,
        folder=str(run.state),
        state=str(run.tracked),
        resumes=config.use_checkpoint,
        training=typed_storage.through_json(job.identity()),
        parameters=typed_storage.through_json(plain_values(config, names)),
    )
    return Follower(task, run.tracking_task, run.metrics, run.log("track"), reporter)


def _start_engine(
    job: TrainJob, context: Context, reporter: Reporter, follower: Follower | None
) -> tuple[_TrainingProgress, str]:
    """Run the engine once; return its progress, and how memory ran out ("" if it did not)."""
    job.write(context.run.job)
    log, kills_before = context.run.log(NAME), hardware.kills_for_memory()
    progress = _TrainingProgress()
    with reporter.progress("training") as bar:

        def on_event(name: str, fields: JsonObject) -> None:
            event = events.parse_event(name, fields)
            if isinstance(event, TrainingBegins) and event.halvings:
                write_memory_backoff(context.run, event.halvings, job.identity())
            _show_event(event, reporter, bar)
            _update(progress, event)
            if follower is not None and isinstance(event, (StepDone, EvaluationDone)):
                follower.update()
            if progress.out_of_memory and job.processes > 1:
                raise _StopTrainingError

        try:
            code = child_process.run(
                get_engine(context.config.engine).module,
                str(context.run.job),
                log=log,
                otherwise=TrainingError,
                on_event=on_event,
                env=ENVIRONMENT,
                ends_at_error=job.processes > 1,  # torchrun would restart the processes, which would fail again
            )
        except _StopTrainingError:
            return progress, "memory ran out"
    if progress.out_of_memory:
        return progress, "memory ran out"
    if shortage := memory_kills.out_of_memory_reason(code, kills_before):
        return progress, shortage
    if code != 0:
        raise TrainingError(f"the training process ended with code {code}: {local.last_lines(log)}", f"See {log}.")
    return progress, ""


def _show_event(event: events.TrainingEvent | None, reporter: Reporter, bar: Progress) -> None:
    match event:
        case StepDone():
            speed = round(event.tokens_per_second)
            bar.update(event.step, event.steps, loss=round(event.loss, 4), tokens_per_second=speed)
        case EvaluationDone():
            right = "" if event.held_out_accuracy is None else f", accuracy {event.held_out_accuracy:.0%}"
            reporter.note(f"held-out loss after step {event.step}: {event.held_out_loss:.4f}{right}")
        case TrainingNote():
            reporter.note(event.text)


def _update(progress: _TrainingProgress, event: events.TrainingEvent | None) -> None:
    match event:
        case TrainingBegins():
            progress.has_begun, progress.step, progress.backoff_steps = True, event.step, event.halvings
        case StepDone():
            progress.step = event.step
            progress.facts["final_loss"] = event.loss
        case EvaluationDone():
            progress.facts.setdefault("first_held_out_loss", event.held_out_loss)
            progress.facts["held_out_loss"] = event.held_out_loss
            if event.held_out_accuracy is not None:
                progress.facts.setdefault("first_held_out_accuracy", event.held_out_accuracy)
                progress.facts["held_out_accuracy"] = event.held_out_accuracy
        case TrainingResult():
            progress.facts |= event.facts()
        case OutOfMemory():
            progress.out_of_memory = True


def _with_less_memory(
    job: TrainJob, progress: _TrainingProgress, shortage: str, config: Config, reporter: Reporter
) -> TrainJob:
    """Return the job that resumes from the last checkpoint with half as many chats at once.

    Raises:
        TrainingError: there is nothing to halve, or it would not help; the hint says what to change.
    """
    batch = job.batch_size >> len(progress.backoff_steps)
    if not progress.has_begun or batch <= 1:
        changes = ["lower --max-seq-length or --lora-rank", "choose a smaller --base-model"]
        if not config.load_in_4bit:
            changes.insert(1, "add --load-in-4bit")
        if batch > 1:
            changes.insert(0, "halve --batch-size and double --gradient-accumulation (same result)")
        raise TrainingError(
            shortage, f"Free some memory and resume with --use-checkpoint, or train from scratch: {', '.join(changes)}."
        )
    reporter.warning(
        f"{shortage} in step {progress.step + 1}: resuming from the last checkpoint with micro-batches of "
        f"{batch // 2} chats instead of {batch}, and twice as many of them, so that the result stays the same"
    )
    return dataclasses.replace(job, resume=True, halvings=[*progress.backoff_steps, 0])
