"""Select, run, record: the whole road from chats to Modelfiles on one screen."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kolotune.base_models import catalog
from kolotune.engines.native.kernels import build
from kolotune.foundation import config as configs
from kolotune.foundation import hardware
from kolotune.foundation.config import Config
from kolotune.foundation.errors import FidelityError, Interrupted, KolotuneError, RunFolderError
from kolotune.foundation.files import Hasher, explained, remove, size_of, write_json, write_text
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.planning import fit
from kolotune.planning.workload import Workload, describe_workload, read_workload
from kolotune.run_folder import manifest, records
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import Context, Stage
from kolotune.run_folder.retention import kept, left_out
from kolotune.stages import compare, convert, merge, modelfile, prepare, quantize, train

STAGES: tuple[Stage, ...] = (prepare, train, merge, convert, quantize, modelfile, compare)
COMPARE = compare.NAME
NAMES = tuple(stage.NAME for stage in STAGES)


def run(
    config: Config,
    reporter: Reporter,
    names: Sequence[str] = NAMES,
    source: Path | None = None,
    again: Sequence[str] = (),
    ahead: Sequence[str] = (),
) -> RunFolder:
    """Runs the stages `names` in the run folder of `config`, each only if something that it depends on changed.

    Args:
        config: the resolved options.
        reporter: where progress and results are told.
        names: names of stages, in any order; those that the config leaves out are left out.
        source: adapter or merged folder made elsewhere, in place of what the run's own stages made.
        again: stages whose outputs are wanted back when they were cleaned. Others stay cleaned unless a stage that
            has work reads them.
        ahead: stages that will be wanted later, in this folder or another: they are asked now what is known to fail.

    Returns:
        The run folder.

    Raises:
        KolotuneError: see `errors`.
    """
    folder = RunFolder(config.output_dir)
    stages = [stage for stage in STAGES if stage.NAME in names and stage.NAME not in not_had(config)]
    with locked(folder):
        try:
            config = _with_choices(config, folder, names)
            base = catalog.resolve(config.base_model, config.hf_token, reporter)
            hasher = Hasher()
            context = Context(config, folder, base, source, hasher)
            wanted = _wanted_back(stages, context, hasher, again)
            stages = [stage for stage in STAGES if stage in stages or stage in wanted]
            later = [stage for stage in STAGES if stage.NAME in ahead and stage.NAME not in not_had(config)]
            _preflight([*stages, *later], context, reporter, hasher, wanted)
            # Only now: a run that was refused leaves what the folder had.
            write_text(folder.config, configs.dump(config))
            records.forget_cleaned(folder, [path for stage in wanted for path in stage.outputs(context)])
            _remember_source(folder, source)
            _remove_what_is_not_kept(context, reporter)
            try:
                for stage in stages:
                    if stage is train:
                        _look_at_the_work(context, reporter, hasher)
                    _run_or_skip(stage, context, reporter, hasher)
            except FidelityError:
                # What was made is what the records say; that it is what was trained is another question.
                made = [stage for stage in stages_of(context) if stage.NAME != COMPARE]
                manifest.write(made, context, hasher)
                raise
            manifest.write(stages_of(context), context, hasher)
        except KolotuneError:
            _log_traceback(folder)
            raise
    return folder


def not_had(config: Config) -> frozenset[str]:
    """The stages that a run with these options does not have."""
    return left_out(config) | (frozenset() if config.compare else {compare.NAME})


def stages_of(context: Context) -> list[Stage]:
    """The stages that a run has: a lean one has fewer, and one that exports something those that it was made with."""
    there = [stage for stage in STAGES if stage.NAME not in not_had(context.config)]
    return [each for each in there if context.source is None or records.read(context.run, each.NAME) is not None]


def context_of(folder: RunFolder, config: Config | None = None) -> Context:
    """What the stages of a finished run work with, without anything being fetched.

    Args:
        folder: the run folder.
        config: options in place of those that it was made with.

    Raises:
        RunFolderError: it is no run folder.
        ConfigError: its saved config can't be read.
    """
    folder.require()
    saved = configs.resolve((configs.load_file(folder.config), str(folder.config), folder.root))
    config = dataclasses.replace(config or saved, output_dir=folder.root)
    base = catalog.locate(config.base_model) or folder.root / "base model is not on this machine"
    return Context(config, folder, base, recorded_source(folder))


def _wanted_back(stages: Sequence[Stage], context: Context, hasher: Hasher, again: Sequence[str]) -> list[Stage]:
    """The stages whose outputs were cleaned and are needed: by name, or because a stage that has work reads them."""
    gone = {context.run.root / name for name in records.cleaned(context.run)}
    wanted: list[Stage] = []
    needed: set[Path] = set()
    there = [stage for stage in STAGES if stage.NAME not in left_out(context.config)]
    for stage in reversed(there) if gone else ():
        outputs = gone & set(stage.outputs(context))
        if outputs & needed or (outputs and stage.NAME in again):
            wanted.append(stage)
        if stage in wanted or (stage in stages and records.reasons(stage, context, hasher)):
            read = [{path, *path.parents} for path in stage.inputs(context).values()]
            needed |= {path for path in gone if any(path in each for each in read)}
    return wanted


def _remove_what_is_not_kept(context: Context, reporter: Reporter) -> None:
    """A lean run in the folder of one that was not: what it leaves out goes, with the records of it.

    Whatever that was can be made again of what is kept.
    """
    for stage in STAGES:
        if stage.NAME not in left_out(context.config):
            continue
        for path in stage.outputs(context):
            if path.exists():
                reporter.note(f"{path.name} is removed: a lean run does not keep it")
                remove(path)
        records.forget_cleaned(context.run, stage.outputs(context))
        remove(context.run.record(stage.NAME))
        records.unmark(context.run, stage.NAME)
    if not kept(context.config).unquantized:
        remove(context.run.modelfile())


def _log_traceback(folder: RunFolder) -> None:
    """Keeps where an expected error came from; the screen shows its cause and what to do."""
    with suppress(OSError):
        folder.logs.mkdir(parents=True, exist_ok=True)
        with folder.log("error").open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{records.now()}\n{traceback.format_exc()}\n")


def _run_or_skip(stage: Stage, context: Context, reporter: Reporter, hasher: Hasher) -> None:
    reasons = records.reasons(stage, context, hasher)
    if not reasons:
        gone = _cleaned_outputs(stage, context)
        reporter.success(f"{stage.NAME}: done before, {gone or 'nothing it depends on has changed'}")
        return
    reporter.doing(f"{stage.NAME}: {stage.DOING} ({'; '.join(reasons)})")
    started, clock = records.now(), time.monotonic()
    records.mark(context.run, stage.NAME, "running")
    try:
        facts = stage.run(context, reporter)
        records.write(stage, context, hasher, facts, started)
    except KolotuneError as error:
        _mark_failed(context, stage, error)
        raise
    except KeyboardInterrupt:
        records.mark(context.run, stage.NAME, "interrupted")
        raise Interrupted(f"stopped during {stage.NAME}") from None
    except OSError as error:
        told = explained(error, Path(error.filename or context.run.root))
        _mark_failed(context, stage, told)
        raise told from error
    records.unmark(context.run, stage.NAME)
    made = ", ".join(f"{path.name} ({format_size(size_of(path))})" for path in stage.outputs(context))
    reporter.success(f"{stage.NAME}: {made or 'nothing to make'} in {time.monotonic() - clock:.1f} s")


def _cleaned_outputs(stage: Stage, context: Context) -> str:
    """What of the stage's outputs was cleaned, as a sentence; "" for nothing."""
    gone = records.cleaned(context.run)
    names = [name for name in map(context.run.relative, stage.outputs(context)) if name in gone]
    return f"{', '.join(names)} cleaned since; made again when needed" if names else ""


def _mark_failed(context: Context, stage: Stage, error: KolotuneError) -> None:
    with suppress(KolotuneError):  # on a full disk the cause that is told stays the first one
        records.mark(context.run, stage.NAME, "failed", error.cause)


def _preflight(
    stages: Sequence[Stage], context: Context, reporter: Reporter, hasher: Hasher, wanted: Sequence[Stage]
) -> None:
    """What is known to fail is not started: every stage that has work is asked before the first one works."""
    busy = to_do(stages, context, hasher, wanted)
    if train in busy:
        _check_space([train], context)  # what takes no time to find out comes first
    for stage in busy:
        stage.preflight(context, reporter)
    if busy:
        _check_space(busy, context)


def to_do(stages: Sequence[Stage], context: Context, hasher: Hasher, wanted: Sequence[Stage] = ()) -> Sequence[Stage]:
    """The stages from the first one on that has work, or whose outputs are `wanted` back."""
    busy = (stage in wanted or bool(records.reasons(stage, context, hasher)) for stage in stages)
    first = next((index for index, has_work in enumerate(busy) if has_work), len(stages))
    return stages[first:]


def _check_space(stages: Sequence[Stage], context: Context, workload: Workload | None = None) -> None:
    """Refuses to start when disk or memory can't hold what the stages make. Before the chats are read the least counts.

    Raises:
        SpaceError: it says what to change.
    """
    fit.require_fit(context, {stage.NAME for stage in stages}, context.run.log("plan"), workload)


def _look_at_the_work(context: Context, reporter: Reporter, hasher: Hasher) -> None:
    """Once the chats are prepared it is known what training them takes: it is told, and checked again."""
    if not context.run.prepared.is_dir() or not records.reasons(train, context, hasher):
        return
    workload = read_workload(context.run.prepared, context.config)
    reporter.note(describe_workload(workload, context.config))
    _check_space([train], context, workload)


def _with_choices(config: Config, folder: RunFolder, names: Sequence[str]) -> Config:
    """The config with what is chosen automatically, which is kept in the folder."""
    config, chosen = with_choices(config, folder, names)
    write_json(folder.choices, chosen)
    return config


def with_choices(config: Config, folder: RunFolder, names: Sequence[str] = NAMES) -> tuple[Config, dict[str, Any]]:
    """The config with what is chosen automatically, and the choices; what the folder's first run chose is kept.

    Whether the training step is compiled is chosen when something is trained: to know, it has to be compiled.
    """
    try:
        chosen: dict[str, Any] = json.loads(folder.choices.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        chosen = {}
    if "template_date" not in chosen:
        chosen["template_date"] = records.now()[:10]
    if "dtype" not in chosen and config.dtype == "auto":
        chosen["dtype"] = hardware.best_dtype()
    if "compile" not in chosen and config.compile == "auto" and train.NAME in names and config.engine == "native":
        chosen["compile"] = "on" if build.usable() else "off"
    if config.template_date is None:
        config = dataclasses.replace(config, template_date=chosen["template_date"])
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=chosen["dtype"])
    if config.compile == "auto":
        config = dataclasses.replace(config, compile=chosen.get("compile", "auto"))
    return config, chosen


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Keeps a second run out of the folder; the lock of a dead process is free again by itself."""
    from filelock import FileLock, Timeout

    try:
        folder.state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, folder.root) from error
    holder = folder.lock_holder
    lock = FileLock(folder.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise RunFolderError(
            f"{folder.root}: is in use by {who.strip()}", "Wait for it to end, or choose another --output-dir."
        ) from None
    except OSError as error:
        raise explained(error, folder.lock) from error
    try:
        write_text(holder, f"process {os.getpid()}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@dataclasses.dataclass(frozen=True)
class StageStatus:
    """One stage's state: "done", "cleaned" (done, and its outputs removed), "will run", "running", "interrupted",
    "failed"; and why."""

    name: str
    state: str
    why: list[str]

    @property
    def has_work(self) -> bool:
        """Whether the stage has to run."""
        return self.state not in ("done", "cleaned")


def status(folder: RunFolder, config: Config | None = None) -> list[StageStatus]:
    """The state of each stage of a run folder, from records and a cache of hashes.

    Args:
        folder: the run folder.
        config: options to hold it against; default: those that it was made with.

    Raises:
        RunFolderError: it is no run folder.
        ConfigError: its saved config can't be read.
    """
    context = context_of(folder, config)
    hasher = Hasher(folder.hash_cache)
    found: list[StageStatus] = []
    for stage in stages_of(context):
        why = records.reasons(stage, context, hasher)
        waits_for = [each.name for each in found if each.has_work]
        if not why and waits_for:
            why = [f"{waits_for[0]} runs before it"]
        mark = records.marked(folder, stage.NAME)
        state = _state_of(mark, bool(why), folder)
        if why and mark.get("cause"):
            why = [mark["cause"], *why]
        if not why and (gone := _cleaned_outputs(stage, context)):
            state, why = "cleaned", [gone]
        found.append(StageStatus(stage.NAME, state, why))
    hasher.save()
    return found


def _state_of(mark: dict[str, str], has_work: bool, folder: RunFolder) -> str:
    if not has_work:
        return "done"
    state = mark.get("state", "will run")
    return "interrupted" if state == "running" and not is_held(folder) else state


def is_held(folder: RunFolder) -> bool:
    """Whether a process works in the folder. The lock tells: a killed one leaves its name behind."""
    from filelock import FileLock, Timeout

    if not folder.lock_holder.is_file():
        return False
    try:
        with FileLock(folder.lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def recorded_source(folder: RunFolder) -> Path | None:
    """What the run folder exports in place of an adapter of its own; None when it trains one."""
    if not folder.source.is_file():
        return None
    return Path(json.loads(folder.source.read_text(encoding="utf-8"))["source"])


def _remember_source(folder: RunFolder, source: Path | None) -> None:
    if source is None:
        folder.source.unlink(missing_ok=True)
    else:
        write_json(folder.source, {"source": str(source)})
