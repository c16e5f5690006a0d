"""The verb `sweep`: try several settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

from . import hints
from .comparison_table import show_when_done
from .launch import submit
from .options import drop_unset, reporter, resolve_flags, with_options
from .parameters import ConfigFile, Data, Json
from .placement import AT_ONCE, FLAGS, Placement, resolve_for_launch, show_plan, take_placement_if_given
from .report import reporting
from .settings import Verbose, show_settings

if TYPE_CHECKING:
    from kolotune.foundation.typed_storage import JsonObject
    from kolotune.sweeping.record import SweepRecord
    from kolotune.sweeping.space import VariedOption

_TRIALS = 10
_DIGITS = 4
_NONE = "-"
Vary = Annotated[
    list[str] | None, typer.Option(metavar="NAME=A,B|LOW..HIGH", help="An option with its values or range; repeatable.")
]
Trials = Annotated[int, typer.Option(min=1, help="Maximum number of settings; all combinations, if fewer.")]
AtOnce = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="K",
        help=f"With --on: trials that run at a time; default {AT_ONCE}, with ssh one per host.",
        show_default=False,
    ),
]
Finish = Annotated[bool, typer.Option("--finish/--no-finish", help="Finish the best one, as `run` does.")]


@with_options(more=FLAGS)
def sweep(
    data: Data = None,
    config: ConfigFile = None,
    vary: Vary = None,
    trials: Trials = _TRIALS,
    at_once: AtOnce = None,
    finish: Finish = True,
    verbose: Verbose = False,
    json: Json = False,
    **flags: Any,
) -> int:
    """Try several settings; the best by held-out loss becomes the model.

    This machine trains one trial after the other; with --on they are parallel jobs.
    """
    from kolotune.sweeping import space
    from kolotune.sweeping import trials as sweeping

    say = reporter(json)
    place = take_placement_if_given(flags)
    if place is None and at_once is not None:
        raise ConfigError("at-once: this machine trains one trial after the other", "Choose another place with --on.")
    shared = resolve_for_launch("sweep", flags, data, config) if place else resolve_flags(flags, data, config)
    if not shared.train_data:
        raise hints.no_chats("sweep")
    hints.require_files(shared)
    varied = space.parse(vary or [])
    show_settings(shared, say, drop_unset(flags), verbose=verbose or json)
    if place is None:
        return _end(shared, sweeping.run(shared, varied, trials, say), say, _finish_here if finish else None)
    return _launch(place.with_token_of(shared, say), shared, varied, trials, at_once, say, finish=finish)


def _launch(
    place: Placement,
    shared: Config,
    varied: Sequence[VariedOption],
    trials: int,
    at_once: int | None,
    say: Reporter,
    *,
    finish: bool,
) -> int:
    """Show the first trial's job; with --submit, launch all trials and finish the best one."""
    from kolotune.launching.job_names import name_for
    from kolotune.launching.launcher import LATER
    from kolotune.launching.registry import launched_job
    from kolotune.sweeping import parallel
    from kolotune.sweeping.trials import shared_elsewhere

    launchers = place.launchers(shared.nnodes, at_once)
    if len(launchers) > 1 and shared.rdzv not in (None, LATER):
        raise ConfigError("rdzv: parallel trials can't all meet at one address", "Leave rdzv out, or use --at-once 1.")
    jobs = parallel.TrialLaunchers(launchers, lambda config: place.job_spec(config, name_for(config.output_dir)))
    plan = launchers[0].plan(jobs.first_spec(shared, varied, trials))
    if not place.submit:
        say.note(f"{len(launchers)} trials run at a time. The job of the first one:")
        show_plan(plan, say)
        return 0
    cancel = hints.command("cancel", shared.output_dir)
    say.note(f"Ctrl-C does not stop jobs; the same command resumes the sweep, {cancel} stops its jobs")
    record = parallel.run(shared, varied, trials, jobs, say)

    def finish_there(best: Config, say: Reporter) -> int:
        folder = RunFolder(best.output_dir)
        launcher = launched_job(folder)[0] if folder.launched.is_file() else launchers[0]
        best = dataclasses.replace(best, template_date=shared_elsewhere(shared).template_date)
        return submit(launcher, jobs.spec_for(best), say)

    return _end(shared, record, say, finish_there if finish else None)


def _finish_here(best: Config, say: Reporter) -> int:
    from kolotune.pipeline.run import run_pipeline

    folder = RunFolder(best.output_dir)
    with show_when_done(folder, say, enabled=best.compare), reporting(folder, say):
        run_pipeline(best, say)
    return 0


def _end(shared: Config, record: SweepRecord, say: Reporter, finish: Callable[[Config, Reporter], int] | None) -> int:
    """Show the trials and finish the best one; return its exit code."""
    from kolotune.report import sweep as page
    from kolotune.sweeping import trials as sweeping

    names, rows = [option.name for option in record.varied], sweeping.table_rows(record)
    say.table("Trials, the best first", ("trial", *names, "held-out loss", "failed"), [_cells(row) for row in rows])
    curves = {trial.number: sweeping.held_out_losses(sweeping.folder_of(trial, shared)) for trial in record.trials}
    title = f"{Path(shared.base_model).name} on {', '.join(path.name for path in shared.train_data)}"
    report = page.write(shared.output_dir, title, names, rows, curves)
    best = record.best
    assert best is not None
    config = dataclasses.replace(sweeping.config_of(best, shared), use_checkpoint=True)
    if finish is not None and (code := finish(config, say)) != 0:
        return code
    say.success(f"Done: trial {best.number} is the best; {report} shows all trials")
    say.note(f"next: {hints.command('chat' if finish else 'merge', config.output_dir)}")
    return 0


def _cells(row: JsonObject) -> tuple[str, ...]:
    *values, loss, failure = row.values()
    return (*map(str, values), f"{loss:.{_DIGITS}f}" if isinstance(loss, float) else _NONE, str(failure or _NONE))
