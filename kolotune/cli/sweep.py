"""The verb that tries several settings: sweep."""

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
from .comparison_table import showing
from .launch import submit
from .options import ConfigFile, Data, Json, config_of, reporter, show, with_options
from .placement import AT_ONCE, FLAGS, Place, resolved, show_plan, taken_if_given
from .report import reporting

if TYPE_CHECKING:
    from kolotune.sweeping.record import Record
    from kolotune.sweeping.space import Varied

_TRIALS = 10
_DIGITS = 4
_NONE = "-"
Vary = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=A,B|LOW..HIGH", help="An option and its values, or their range; several times."),
]
Trials = Annotated[int, typer.Option(min=1, help="Settings that are tried, at most; few combinations are all tried.")]
AtOnce = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="K",
        help=f"With --on: trials at work at a time; default {AT_ONCE}, with ssh one on each host.",
        show_default=False,
    ),
]
Finish = Annotated[bool, typer.Option("--finish/--no-finish", help="Bring the best one to its end, as `run` does.")]


@with_options("data", "model", "training", "machines", "export", "comparison", more=FLAGS)
def sweep(
    data: Data = None,
    config: ConfigFile = None,
    vary: Vary = None,
    trials: Trials = _TRIALS,
    at_once: AtOnce = None,
    finish: Finish = True,
    json: Json = False,
    **flags: Any,
) -> int:
    """Try several settings; the best by held-out loss becomes the model.

    One after the other on this machine, or with --on as jobs side by side.
    """
    from kolotune.sweeping import space
    from kolotune.sweeping import trials as sweeping

    say = reporter(json)
    place = taken_if_given(flags)
    if place is None and at_once is not None:
        raise ConfigError("at-once: on this machine one trial is trained after the other", "Say where with --on.")
    wanted = resolved("sweep", flags, data, config) if place else config_of(flags, data, config)
    if not wanted.train_data:
        raise hints.no_chats("sweep")
    hints.require_files((*wanted.train_data, *wanted.eval_data))
    what = space.parse(vary or [])
    if place is None:
        show(wanted, say)
        return _end(wanted, sweeping.run(wanted, what, trials, say), say, _finished_here if finish else None)
    return _side_by_side(place.with_token_of(wanted, say), wanted, what, trials, at_once, say, finish=finish)


def _side_by_side(
    place: Place,
    wanted: Config,
    what: Sequence[Varied],
    trials: int,
    at_once: int | None,
    say: Reporter,
    *,
    finish: bool,
) -> int:
    """Shows what would be launched for the first trial; or launches all, and the best one's way to its end."""
    from kolotune.launching.job_names import name_for
    from kolotune.launching.launcher import LATER
    from kolotune.launching.registry import launched_job
    from kolotune.sweeping import parallel
    from kolotune.sweeping.trials import shared_elsewhere

    launchers = place.side_by_side(wanted.nnodes, at_once)
    if len(launchers) > 1 and wanted.rdzv not in (None, LATER):
        raise ConfigError("rdzv: trials side by side can't all meet in one place", "Leave rdzv out, or --at-once 1.")
    placing = parallel.Placing(launchers, lambda config: place.job_spec(config, name_for(config.output_dir)))
    plan = launchers[0].plan(placing.first(wanted, what, trials))
    show(wanted, say)
    if not place.submit:
        say.note(f"of the trials {len(launchers)} are at work at a time; the first one's job:")
        show_plan(plan, say)
        return 0
    shown = hints.as_typed(wanted.output_dir)
    say.note(f"Ctrl-C leaves jobs at work, and the same command goes on; kolotune cancel {shown} stops them")
    record = parallel.run(wanted, what, trials, placing, say)

    def finished_there(chosen: Config, say: Reporter) -> int:
        folder = RunFolder(chosen.output_dir)
        launcher = launched_job(folder)[0] if folder.launched.is_file() else launchers[0]
        chosen = dataclasses.replace(chosen, template_date=shared_elsewhere(wanted).template_date)
        return submit(launcher, placing.order(chosen), say)

    return _end(wanted, record, say, finished_there if finish else None)


def _finished_here(chosen: Config, say: Reporter) -> int:
    from kolotune.pipeline.run import run_pipeline

    folder = RunFolder(chosen.output_dir)
    with showing(folder, say, wanted=chosen.compare), reporting(folder, say):
        run_pipeline(chosen, say)
    return 0


def _end(wanted: Config, record: Record, say: Reporter, finished: Callable[[Config, Reporter], int] | None) -> int:
    """Tells what came of the trials, and brings the best one to its end; returns the exit code of that."""
    from kolotune.report import sweep as page
    from kolotune.sweeping import trials as sweeping

    _tell(record, say)
    curves = {each.number: sweeping.held_out_losses(sweeping.folder_of(each, wanted)) for each in record.trials}
    title = f"{Path(wanted.base_model).name} on {', '.join(each.name for each in wanted.train_data)}"
    names, rows = [each.name for each in record.varied], sweeping.rows(record)
    shown_at = page.write(wanted.output_dir, title, names, rows, curves)
    best = record.best
    assert best is not None
    chosen = dataclasses.replace(sweeping.config_of(best, wanted), use_checkpoint=True)
    if finished is not None and (code := finished(chosen, say)) != 0:
        return code
    say.success(f"Done: trial {best.number} is the best; {shown_at} shows all")
    shown = hints.as_typed(chosen.output_dir)
    say.note(
        f"talk to it:          kolotune chat {shown}"
        if finished is not None
        else f"its model:           kolotune merge {shown}"
    )
    return 0


def _tell(record: Record, say: Reporter) -> None:
    from kolotune.sweeping.trials import rows

    names = [each.name for each in record.varied]
    shown = [
        (*(str(row[name]) for name in ("trial", *names)), _loss(row["loss"]), row["failure"] or _NONE)
        for row in rows(record)
    ]
    say.table("Trials, the best first", ("trial", *names, "held-out loss", "failed"), shown)


def _loss(value: float | None) -> str:
    return _NONE if value is None else f"{value:.{_DIGITS}f}"
