"""The verb that tries several settings: sweep."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..layout import RunFolder
from ..reporter import Reporter
from . import hints
from .comparison import showing
from .options import ConfigFile, Data, Json, config_of, reporter, show, with_options
from .proof import reporting

if TYPE_CHECKING:
    from ..sweeping.record import Record

_TRIALS = 10
_DIGITS = 4
_NONE = "-"
Vary = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads annotations at run time
    typer.Option(metavar="NAME=A,B|LOW..HIGH", help="An option and its values, or their range; several times."),
]
Trials = Annotated[int, typer.Option(min=1, help="Settings that are tried, at most; few combinations are all tried.")]
Finish = Annotated[bool, typer.Option("--finish/--no-finish", help="Bring the best one to its end, as `run` does.")]


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this module."""
    app.command()(sweep)


@with_options("data", "model", "training", "machines", "export", "comparison")
def sweep(
    data: Data = None,
    config: ConfigFile = None,
    vary: Vary = None,
    trials: Trials = _TRIALS,
    finish: Finish = True,
    json: Json = False,
    **flags: Any,
) -> int:
    """Trains with several settings over the same chats; the best by held-out loss becomes the model."""
    from .. import pipeline
    from ..report import sweep as page
    from ..sweeping import trials as sweeping
    from ..sweeping import varied

    say = reporter(json)
    resolved = config_of(flags, data, config)
    if not resolved.train_data:
        raise hints.no_chats("sweep")
    hints.require_files((*resolved.train_data, *resolved.eval_data))
    wanted = varied.parse(vary or [])
    show(resolved, say)
    record = sweeping.run(resolved, wanted, trials, say)
    _tell(record, say)
    curves = {each.number: sweeping.held_out_losses(sweeping.folder_of(each, resolved)) for each in record.trials}
    title = f"{Path(resolved.base_model).name} on {', '.join(each.name for each in resolved.train_data)}"
    shown_at = page.write(resolved.output_dir, title, [each.name for each in wanted], sweeping.rows(record), curves)
    best = record.best
    assert best is not None
    chosen = sweeping.config_of(best, resolved)
    folder = RunFolder(chosen.output_dir)
    if finish:
        chosen = dataclasses.replace(chosen, use_checkpoint=True)
        with showing(folder, say, wanted=chosen.compare), reporting(folder, say):
            pipeline.run(chosen, say)
    say.success(f"Done: trial {best.number} is the best; {shown_at} shows all")
    shown = hints.as_typed(folder.root)
    say.note(
        f"talk to it:          kolotune chat {shown}" if finish else f"its model:           kolotune merge {shown}"
    )
    return 0


def _tell(record: Record, say: Reporter) -> None:
    from ..sweeping.trials import rows

    names = [each.name for each in record.varied]
    shown = [
        (*(str(row[name]) for name in ("trial", *names)), _loss(row["loss"]), row["failure"] or _NONE)
        for row in rows(record)
    ]
    say.table("Trials, the best first", ("trial", *names, "held-out loss", "failed"), shown)


def _loss(value: float | None) -> str:
    return _NONE if value is None else f"{value:.{_DIGITS}f}"
