"""The verbs of clusters and other machines: launch, follow, cancel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

from . import hints
from .options import ConfigFile, Data, Json, reporter, show, with_options
from .placement import FLAGS, resolved, show_plan, taken

if TYPE_CHECKING:
    from kolotune.launching.launcher import Launched, Launcher, Order

Run = Annotated[Path, typer.Argument(help="The run folder that the job was launched from.")]


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this module."""
    for verb in (launch, follow, cancel):
        app.command()(verb)


@with_options("data", "model", "training", "machines", "export", "comparison", leave_out=("hf_token",), more=FLAGS)
def launch(
    data: Data = None,
    config: ConfigFile = None,
    detach: Annotated[bool, typer.Option("--detach", help="Don't wait: `kolotune follow` goes on from there.")] = False,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The job's name; default: one that belongs to the run folder.", show_default=False),
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Chats and base model are named as they are there; send nothing but options."),
    ] = False,
    json: Json = False,
    **flags: Any,
) -> int:
    """A run on a cluster or other machines. Shows exactly what it would do; with --submit, does it."""
    from kolotune.launching.launcher import name_for

    say = reporter(json)
    place = taken(flags)
    launcher = place.launcher()
    wanted = resolved("launch", flags, data, config, machines=len(place.hosts))
    place = place.with_token_of(wanted, say)
    if not in_place:
        hints.require_files((*wanted.train_data, *wanted.eval_data))
    order = place.order(wanted, name or name_for(wanted.output_dir), in_place=in_place)
    if not place.submit:
        show(wanted, say)
        show_plan(launcher.plan(order), say)
        return 0
    return submit(launcher, order, say, detach=detach)


def follow(
    run: Run = DEFAULT_OUTPUT_DIR,
    fetch: Annotated[bool, typer.Option("--fetch/--no-fetch", help="Bring the results here at the end.")] = True,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait for the end, and tell what the job tells.")
    ] = True,
    json: Json = False,
) -> int:
    """What a launched job tells, until it ends; then its results are fetched."""
    from kolotune.launching.registry import again

    say = reporter(json)
    folder = RunFolder(run.absolute())
    launcher, launched = again(folder)
    return _follow(launcher, launched, folder, say, wait=wait, fetch=fetch)


def cancel(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False) -> int:
    """Stops a launched job, or those of a sweep."""
    from kolotune.launching.registry import again
    from kolotune.sweeping.record import not_over

    say = reporter(json)
    folder = RunFolder(run.absolute())
    trials = [RunFolder(folder.root / name) for name in not_over(folder.root)]
    for each in [trial for trial in trials if trial.launched.is_file()] or [folder]:
        launcher, launched = again(each)
        launcher.cancel(launched, say)
        say.success(f"stopped: job {launched.job}")
    return 0


def submit(launcher: Launcher, order: Order, say: Reporter, *, detach: bool = False) -> int:
    """Launches a run, and follows it unless it is left alone; returns its exit code."""
    folder = RunFolder(order.config.output_dir)
    launched = launcher.submit(order, say)
    launched.write(folder)
    if detach:
        say.note(f"what it tells, and its results: kolotune follow {folder.root}")
        return 0
    say.note(f"Ctrl-C leaves it at work; later: kolotune follow {folder.root}, or kolotune cancel {folder.root}")
    return _follow(launcher, launched, folder, say, wait=True, fetch=True)


def _follow(
    launcher: Launcher, launched: Launched, folder: RunFolder, say: Reporter, *, wait: bool, fetch: bool
) -> int:
    code = launcher.follow(launched, say) if wait else 0
    if fetch:
        came = [name for name in launcher.fetch(launched, folder, say) if not name.startswith(".")]
        if came:
            say.note(f"fetched to {folder.root}: {', '.join(came)}")
    return code
