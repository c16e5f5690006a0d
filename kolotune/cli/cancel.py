"""The verb `cancel`: stop a launched job."""

from __future__ import annotations

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.run_folder.layout import RunFolder

from .follow import LaunchedRun
from .options import reporter
from .parameters import Json


def cancel(run: LaunchedRun = DEFAULT_OUTPUT_DIR, json: Json = False) -> int:
    """Stop a launched job, or the jobs of a sweep."""
    from kolotune.launching.registry import launched_job
    from kolotune.sweeping.record import unfinished_trials

    say = reporter(json)
    folder = RunFolder(run.absolute())
    trials = [RunFolder(folder.root / name) for name in unfinished_trials(folder.root)]
    for trial in [trial for trial in trials if trial.launched.is_file()] or [folder]:
        launcher, job = launched_job(trial)
        launcher.cancel(job, say)
        say.success(f"stopped: job {job.job}")
    return 0
