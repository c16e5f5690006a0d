"""Trials in parallel: each is a job of its own on a cluster or another machine, and several run at the same time.

A job only prepares and trains. Where it shares this machine's disk it finds the chats prepared; elsewhere it prepares
them again, and the hash of its chats is compared with that of the chats here. One thread submits the jobs one after
the other and does everything else; only following a job and fetching its results happens in a thread of its own.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kolotune.foundation import typed_storage
from kolotune.foundation.config import Config
from kolotune.foundation.errors import (
    Interrupted,
    KolotuneError,
    LaunchError,
    RunFolderError,
    SpaceError,
    TrainingError,
)
from kolotune.foundation.reporter import Reporter
from kolotune.launching.launcher import JobSpec, LaunchedJob, Launcher
from kolotune.launching.registry import launched_job
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record
from kolotune.stages import prepare

from .attribution import TrialReporter
from .record import SweepRecord, Trial
from .search import next_values
from .space import VariedOption
from .trials import Sweep, config_of, folder_of, held_out_losses, loss_of, share_chats, shared_elsewhere, start

# Exit codes of a job whose setting may be at fault; with any other code it is the launcher.
_FAULT_OF_SETTING = (TrainingError.exit_code, SpaceError.exit_code)


@dataclass(frozen=True)
class TrialLaunchers:
    """Where trials are trained.

    Attributes:
        launchers: one for each trial that may run at the same time.
        spec_for: makes the spec of a job from a run's options.
    """

    launchers: Sequence[Launcher]
    spec_for: Callable[[Config], JobSpec]

    def spec_of(self, trial: Trial, shared: Config) -> JobSpec:
        """Return the spec of a trial's job; `shared` are the options that all trials share."""
        config = dataclasses.replace(config_of(trial, shared), use_checkpoint=True, compare=False)
        return dataclasses.replace(self.spec_for(config), only_train=True)

    def first_spec(self, config: Config, varied: Sequence[VariedOption], trials: int) -> JobSpec:
        """Return the spec of a new sweep's first trial, without making anything.

        Args:
            config: the options that all trials share; `output_dir` is the sweep's folder.
            varied: the varied options.
            trials: the maximum number of trials.
        """
        values = next_values(SweepRecord(list(varied), ""), trials, config.seed) or {}
        return self.spec_of(Trial(1, values), shared_elsewhere(config))


@dataclass
class _TrialJob:
    """A trial that is running.

    Attributes:
        launcher, job: who launched it, and the launched job.
        reporter: shows its messages.
        frees_launcher: its end makes the launcher available for another trial.
        is_old: an earlier sweep, which was stopped, launched it.
        code: its exit code, once it has ended.
        error: what went wrong while following it or fetching its results.
    """

    trial: Trial
    launcher: Launcher
    job: LaunchedJob
    reporter: TrialReporter
    frees_launcher: bool = True
    is_old: bool = False
    code: int | None = None
    error: BaseException | None = None

    def problem(self) -> str:
        """Describe why it failed, or why its results did not arrive; "" when all is well."""
        if isinstance(self.error, KolotuneError):
            return self.error.cause
        return (self.reporter.cause or f"its job ended with code {self.code}") if self.code else ""


def run(
    config: Config, varied: Sequence[VariedOption], trials: int, launchers: TrialLaunchers, reporter: Reporter
) -> SweepRecord:
    """Train one adapter for each setting that is not trained yet, several at the same time.

    A launcher that refuses a job, or whose job fails for a reason other than its training, is not used any more, and
    another one gets the trial. Jobs survive the end of this process, and the next call follows them.

    Args:
        config, varied, trials, reporter: see `trials.run`.
        launchers: where.

    Raises:
        LaunchError: no launcher is left.
        KolotuneError: see `trials.run`.
    """
    sweep = start(config, varied, trials, reporter, elsewhere=True)
    _ParallelSweep(sweep, launchers, reporter).run()
    return sweep.finish()


class _ParallelSweep:
    def __init__(self, sweep: Sweep, launchers: TrialLaunchers, reporter: Reporter) -> None:
        self._sweep, self._launchers, self._reporter = sweep, launchers, reporter
        self._free = list(launchers.launchers)
        self._waiting: list[Trial] = []
        self._running = 0
        self._ended: queue.SimpleQueue[_TrialJob] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._refusal = ""

    def run(self) -> None:
        for trial in self._sweep.record.trials:
            if not trial.has_ended:
                self._resume(trial)
        while True:
            while self._free and (next_trial := self._next_trial()) is not None:
                self._launch(next_trial)
            if not self._running:
                break
            self._handle_end(self._ended.get())
        if self._waiting:
            raise LaunchError(self._refusal, "Fix that, then run the same command again to resume the sweep.")

    def _next_trial(self) -> Trial | None:
        return self._waiting.pop(0) if self._waiting else self._sweep.next_trial()

    def _folder_of(self, trial: Trial) -> RunFolder:
        return folder_of(trial, self._sweep.shared)

    def _resume(self, trial: Trial) -> None:
        """Follow the job of a trial that was launched before; it may still be running."""
        try:
            launcher, job = launched_job(self._folder_of(trial))
        except RunFolderError:
            self._waiting.append(trial)
            return
        uses_launcher = launcher in self._free
        if uses_launcher:
            self._free.remove(launcher)
        self._follow(
            _TrialJob(trial, launcher, job, self._reporter_for(trial), frees_launcher=uses_launcher, is_old=True)
        )

    def _launch(self, trial: Trial) -> None:
        launcher, reporter = self._free.pop(0), self._reporter_for(trial)
        reporter.doing(trial.describe())
        spec, folder = self._launchers.spec_of(trial, self._sweep.shared), self._folder_of(trial)
        if not folder.prepared.exists():
            share_chats(self._sweep.chats, folder)
            # The date belongs to the chats; other choices made here need not suit the machine that trains.
            typed_storage.write(folder.choices, {"template_date": spec.config.template_date})
        try:
            job = launcher.submit(spec, reporter)
        except LaunchError as error:
            self._drop_launcher(trial, error.cause)
            return
        job.write(folder)
        self._follow(_TrialJob(trial, launcher, job, reporter))

    def _follow(self, job: _TrialJob) -> None:
        self._running += 1
        # A daemon thread: when this process is stopped, it does not wait for the job.
        threading.Thread(target=_follow, args=(job, self._folder_of(job.trial), self._ended), daemon=True).start()

    def _handle_end(self, job: _TrialJob) -> None:
        """Record the result of a job, and free its launcher or drop it."""
        self._running -= 1
        if job.error is not None and not isinstance(job.error, LaunchError):
            raise job.error
        trial, problem = job.trial, job.problem()
        is_trained, is_lost = job.code == 0, job.code in (None, Interrupted.exit_code)
        if is_trained and not (problem := problem or self._problem_of_results(trial)):
            trial.loss = loss_of(self._folder_of(trial), config_of(trial, self._sweep.shared))
            job.reporter.success(f"held-out loss {trial.loss:.4f} ({trial.describe()})")
        elif job.code in _FAULT_OF_SETTING or (is_lost and not job.is_old):
            trial.failure = problem
            job.reporter.warning(f"failed: {problem}")
        elif job.is_old and not is_trained:  # it ended while nobody followed it; somebody may have stopped it
            self._waiting.append(trial)
            job.reporter.note(f"is launched again: {problem}")
        else:
            self._drop_launcher(trial, problem)
            return
        self._sweep.write()
        if job.frees_launcher:
            self._free.append(job.launcher)

    def _problem_of_results(self, trial: Trial) -> str:
        """Describe why the results of a trained trial can't be compared with the others; "" when they can."""
        folder = self._folder_of(trial)
        theirs, ours = (read_record(run, prepare.NAME) for run in (folder, self._sweep.chats))
        if theirs is None or ours is None or theirs.outputs != ours.outputs:
            return "its chats were prepared differently than here (does it have the same kolotune and packages?)"
        return "" if held_out_losses(folder) else f"its results did not arrive: there is no {folder.metrics.name}"

    def _drop_launcher(self, trial: Trial, problem: str) -> None:
        """Use a launcher no more; another one gets the trial."""
        self._refusal = problem
        self._waiting.append(trial)
        self._reporter_for(trial).warning(f"{problem}; it waits for another machine, if there is one")

    def _reporter_for(self, trial: Trial) -> TrialReporter:
        return TrialReporter(self._reporter, f"trial {trial.number}", self._lock)


def _follow(job: _TrialJob, folder: RunFolder, ended: queue.SimpleQueue[_TrialJob]) -> None:
    try:
        job.code = job.launcher.follow(job.job, job.reporter)
        job.launcher.fetch(job.job, folder, job.reporter)
    except BaseException as error:
        job.error = error  # raised or shown by the thread that waits for all jobs
    ended.put(job)
