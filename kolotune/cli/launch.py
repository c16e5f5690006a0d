"""The verb `launch`: a run as a job on a cluster or other machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

from . import hints
from .follow import follow_job
from .options import drop_unset, reporter, with_options
from .parameters import ConfigFile, Data, Json
from .placement import FLAGS, resolve_for_launch, show_plan, take_placement
from .settings import Verbose, show_settings

if TYPE_CHECKING:
    from kolotune.launching.launcher import JobSpec, Launcher


@with_options(more=FLAGS)
def launch(
    data: Data = None,
    config: ConfigFile = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait; `kolotune follow` shows it later.")] = False,
    name: Annotated[
        str | None, typer.Option(help="The job's name; default: made from the run folder.", show_default=False)
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Chats and base model are there already; send only options.")
    ] = False,
    verbose: Verbose = False,
    json: Json = False,
    **flags: Any,
) -> int:
    """Run on a cluster or other machines; --submit starts it."""
    from kolotune.launching.job_names import name_for

    say = reporter(json)
    place = take_placement(flags)
    launcher = place.launcher()
    options = resolve_for_launch("launch", flags, data, config, machines=len(place.hosts))
    place = place.with_token_of(options, say)
    if not in_place:
        hints.require_files(options)
    spec = place.job_spec(options, name or name_for(options.output_dir), in_place=in_place)
    if not place.submit:
        show_settings(options, say, drop_unset(flags), verbose=verbose or json)
        show_plan(launcher.plan(spec), say)
        return 0
    return submit(launcher, spec, say, detach=detach)


def submit(launcher: Launcher, spec: JobSpec, say: Reporter, *, detach: bool = False) -> int:
    """Launch a run and follow it, unless `detach`; return its exit code."""
    folder = RunFolder(spec.config.output_dir)
    job = launcher.submit(spec, say)
    job.write(folder)
    if detach:
        say.note(f"Follow it and fetch its results: kolotune follow {folder.root}")
        return 0
    say.note(f"Ctrl-C does not stop the job. Later: kolotune follow {folder.root}, or kolotune cancel {folder.root}")
    return follow_job(launcher, job, folder, say, wait=True, fetch=True)
