"""Trials side by side: each is a job of its own that a launcher places, several are followed at the same time.

A job prepares and trains, no more. Where it shares this machine's disk it finds the chats prepared; elsewhere it
prepares them again, and their hash is held against that of those here. Jobs are submitted one after the other, by the
thread that does everything else, too; only following one and fetching its results has a thread of its own.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kolotune.foundation.config import Config
from kolotune.foundation.errors import (
    Interrupted,
    KolotuneError,
    LaunchError,
    RunFolderError,
    SpaceError,
    TrainingError,
)
from kolotune.foundation.files import write_json
from kolotune.foundation.reporter import Reporter
from kolotune.launching.launcher import JobSpec, LaunchedJob, Launcher
from kolotune.launching.registry import launched_job
from kolotune.run_folder import records
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record
from kolotune.stages import prepare

from .attribution import OneOfSeveral
from .record import Record, Trial
from .search import next_values
from .space import Varied
from .trials import Sweep, begin, config_of, folder_of, held_out_losses, in_words, loss_of, share, shared_elsewhere

# How a job ends whose setting is to blame, or may be; with any other end it is the place that can't do it.
_OF_THE_SETTING = (TrainingError.exit_code, SpaceError.exit_code)


@dataclass(frozen=True)
class Placing:
    """Where trials are trained.

    Attributes:
        launchers: one for each trial that may be at work at the same time.
        order: makes what is launched out of a run's options.
    """

    launchers: Sequence[Launcher]
    order: Callable[[Config], JobSpec]

    def order_of(self, trial: Trial, shared: Config) -> JobSpec:
        """What is launched for a trial; `shared` are the options that all have."""
        config = dataclasses.replace(config_of(trial, shared), use_checkpoint=True, compare=False)
        return dataclasses.replace(self.order(config), only_train=True)

    def first(self, config: Config, varied: Sequence[Varied], trials: int) -> JobSpec:
        """What would be launched for the first trial of a new sweep; nothing is made.

        Args:
            config: the options that all trials share; `output_dir` is the sweep's folder.
            varied: what differs.
            trials: how many there shall be, at most.
        """
        values = next_values(Record(list(varied), ""), trials, config.seed) or {}
        return self.order_of(Trial(1, values), shared_elsewhere(config))


@dataclass
class _Job:
    """A trial at work.

    Attributes:
        launcher, launched: who placed it, and what came of that.
        told: learns what it tells.
        has_place: one of the places is free again when it ends.
        is_old: a sweep that was stopped has launched it.
        code: its exit code, once it has ended.
        error: what kept us from following it, or from fetching its results.
    """

    trial: Trial
    launcher: Launcher
    launched: LaunchedJob
    told: OneOfSeveral
    has_place: bool = True
    is_old: bool = False
    code: int | None = None
    error: BaseException | None = None


def run(config: Config, varied: Sequence[Varied], trials: int, placing: Placing, reporter: Reporter) -> Record:
    """Trains one adapter for each setting, several at the same time; what was trained before is not trained again.

    A place that refuses a job, or where one fails of something else than its training, is left out: the trial is done
    elsewhere. What is at work when this is stopped stays at work, and is followed by the next call.

    Args:
        config, varied, trials, reporter: see `trials.run`.
        placing: where.

    Raises:
        LaunchError: no place can do it.
        KolotuneError: see `trials.run`.
    """
    sweep = begin(config, varied, trials, reporter, elsewhere=True)
    _SideBySide(sweep, placing, reporter).run()
    return sweep.end()


class _SideBySide:
    def __init__(self, sweep: Sweep, placing: Placing, reporter: Reporter) -> None:
        self._sweep, self._placing, self._reporter = sweep, placing, reporter
        self._free = list(placing.launchers)
        self._waiting: list[Trial] = []
        self._at_work = 0
        self._ended: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._refusal = ""

    def run(self) -> None:
        for begun in self._sweep.record.trials:
            if not begun.is_over:
                self._take_up(begun)
        while True:
            while self._free and (trial := self._next()) is not None:
                self._launch(trial)
            if not self._at_work:
                break
            self._end(self._ended.get())
        if self._waiting:
            raise LaunchError(self._refusal, "Once that is mended, the same command goes on with the sweep.")

    def _next(self) -> Trial | None:
        return self._waiting.pop(0) if self._waiting else self._sweep.next()

    def _take_up(self, trial: Trial) -> None:
        """A trial that was begun before: its job may be at work still."""
        try:
            launcher, launched = launched_job(folder_of(trial, self._sweep.shared))
        except RunFolderError:
            self._waiting.append(trial)
            return
        has_place = launcher in self._free
        if has_place:
            self._free.remove(launcher)
        self._follow(_Job(trial, launcher, launched, self._telling(trial), has_place=has_place, is_old=True))

    def _launch(self, trial: Trial) -> None:
        launcher, told = self._free.pop(0), self._telling(trial)
        told.doing(in_words(trial))
        order, folder = self._placing.order_of(trial, self._sweep.shared), folder_of(trial, self._sweep.shared)
        if not folder.prepared.exists():
            share(self._sweep.chats, folder)
            # The date is that of the chats; what else was chosen here need not suit the machine that trains.
            write_json(folder.choices, {"template_date": order.config.template_date})
        try:
            launched = launcher.submit(order, told)
        except LaunchError as error:
            self._leave_out(trial, error.cause)
            return
        launched.write(folder)
        self._follow(_Job(trial, launcher, launched, told))

    def _follow(self, job: _Job) -> None:
        folder = folder_of(job.trial, self._sweep.shared)
        self._at_work += 1
        # When we are stopped, nobody waits for it.
        threading.Thread(target=_follow, args=(job, folder, self._ended), daemon=True).start()

    def _end(self, job: _Job) -> None:
        """Tells the record what came of a job; its place is free again, or left out."""
        self._at_work -= 1
        if job.error is not None and not isinstance(job.error, LaunchError):
            raise job.error
        trial, why = job.trial, _why(job)
        is_trained, is_lost = job.code == 0, job.code in (None, Interrupted.exit_code)
        if is_trained and not (why := why or self._unusable(trial)):
            trial.loss = loss_of(folder_of(trial, self._sweep.shared), config_of(trial, self._sweep.shared))
            job.told.success(f"held-out loss {trial.loss:.4f} ({in_words(trial)})")
        elif job.code in _OF_THE_SETTING or (is_lost and not job.is_old):
            trial.failure = why
            job.told.warning(f"failed: {why}")
        elif job.is_old and not is_trained:  # it ended while nobody looked, maybe because somebody stopped it
            self._waiting.append(trial)
            job.told.note(f"is launched again: {why}")
        else:
            self._leave_out(trial, why)
            return
        self._sweep.write()
        if job.has_place:
            self._free.append(job.launcher)

    def _unusable(self, trial: Trial) -> str:
        """Why what a trained trial has brought can't be held against the others; "" where it can."""
        folder = folder_of(trial, self._sweep.shared)
        found, wanted = (read_record(each, prepare.NAME) for each in (folder, self._sweep.chats))
        if found is None or wanted is None or found.outputs != wanted.outputs:
            return "its chats were prepared otherwise than here (is kolotune with its packages the same there?)"
        return "" if held_out_losses(folder) else f"its results did not come: there is no {folder.metrics.name}"

    def _leave_out(self, trial: Trial, why: str) -> None:
        """A place that can't do it gets nothing more; the trial is done elsewhere."""
        self._refusal = why
        self._waiting.append(trial)
        self._telling(trial).warning(f"{why}; left for another place, if there is one")

    def _telling(self, trial: Trial) -> OneOfSeveral:
        return OneOfSeveral(self._reporter, f"trial {trial.number}", self._lock)


def _follow(job: _Job, folder: RunFolder, ended: queue.SimpleQueue[_Job]) -> None:
    try:
        job.code = job.launcher.follow(job.launched, job.told)
        job.launcher.fetch(job.launched, folder, job.told)
    except BaseException as error:
        job.error = error  # raised, or told, where all the others are waited for
    ended.put(job)


def _why(job: _Job) -> str:
    """Why a job did not end well, or its results did not come; "" when all is well."""
    if isinstance(job.error, KolotuneError):
        return job.error.cause
    return (job.told.cause or f"its job ended with code {job.code}") if job.code else ""
