"""The verbs about a finished run: report, verify, rebuild, push."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from kolotune.foundation import config as configs
from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.foundation.errors import FidelityError, ManifestError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

from .options import Json, config_of, reporter


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this module."""
    for verb in (report, verify, rebuild, push):
        app.command()(verb)


def report(
    run: Annotated[Path, typer.Argument(help="The run folder.")] = DEFAULT_OUTPUT_DIR, json: Json = False
) -> int:
    """One page about a run, to look at: losses, data, fidelity, answers, sizes; it needs no network."""
    from kolotune.report import page

    written = page.write(RunFolder(run.absolute()))
    reporter(json).success(f"{written} ({format_size(written.stat().st_size)}): open it in a browser")
    return 0


@contextmanager
def reporting(folder: RunFolder, say: Reporter) -> Iterator[None]:
    """Writes the page when the block is done, or when it ends because the comparison failed."""
    try:
        yield
    except FidelityError:
        _write_report(folder, say)
        raise
    _write_report(folder, say)


def _write_report(folder: RunFolder, say: Reporter) -> None:
    """The page at a run's end, by a process of its own: drawing needs memory, and its failure is none of the run."""
    from kolotune.runners import local

    log = folder.log("report")
    code = local.run(local.python("kolotune.report", str(folder.root)), log=log, ends_with_parent=True)
    if code == 0:
        say.success(f"report: {folder.report.name}")
    else:
        say.warning(f"there is no {folder.report.name}: {local.last_lines(log)}")


def verify(
    run: Annotated[Path, typer.Argument(help="The run folder.")] = DEFAULT_OUTPUT_DIR, json: Json = False
) -> int:
    """Reads every byte of a run and holds it against its manifest."""
    from kolotune.runs import verify as verifying

    say = reporter(json)
    say.doing(f"reading {run}")
    findings = verifying.verify(RunFolder(run.absolute()))
    for each in findings.absent:
        say.note(f"not here, and so not checked: {each}")
    for each in findings.differences:
        say.warning(each)
    if findings.differences:
        count = len(findings.differences)
        raise ManifestError(f"{run}: {count} difference{'s' if count > 1 else ''} from its manifest")
    say.success(f"{run}: {findings.files} files, {format_size(findings.bytes)}, are what the manifest says")
    return 0


def rebuild(
    manifest: Annotated[Path, typer.Argument(help="The manifest.json of a run.")],
    output_dir: Annotated[Optional[Path], typer.Option(help="The new run folder.", show_default="RUN-rebuilt")] = None,  # noqa: UP045
    json: Json = False,
) -> int:
    """Repeats a run from its manifest, and says whether the same came of it."""
    from kolotune.runs import rebuild as rebuilding

    say = reporter(json)
    file = Path(os.path.abspath(manifest / RunFolder(manifest).manifest.name if manifest.is_dir() else manifest))
    folder = output_dir or file.parent.with_name(f"{file.parent.name}-rebuilt")
    rebuilt = rebuilding.rebuild(file, Path(os.path.abspath(folder)), say)
    if rebuilt.circumstances:
        say.table("Other circumstances", ("what", "then", "now"), rebuilt.circumstances)
    if rebuilt.different:
        for name in rebuilt.different:
            say.warning(f"{name} is another")
        raise ManifestError(
            f"{rebuilt.folder.root}: {len(rebuilt.different)} of {len(rebuilt.same) + len(rebuilt.different)} results "
            "differ from those of the manifest",
            "Same versions, processor and threads give the same bytes; those that differ are in the table."
            if rebuilt.circumstances
            else "Nothing is known to differ; on a GPU or with torchtune sums may fall otherwise each time.",
        )
    say.success(f"{rebuilt.folder.root}: all {len(rebuilt.same)} results have the same hashes")
    return 0


def push(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    repository: Annotated[str, typer.Argument(help="Its name on the hub: owner/name.")],
    what: Annotated[Literal["adapter", "merged", "gguf"], typer.Option(help="What is pushed.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the model card and the files; send nothing.")
    ] = False,
    hf_token: Annotated[Optional[str], typer.Option(help=str(configs.FIELDS["hf_token"].metadata["help"]))] = None,  # noqa: UP045
    json: Json = False,
) -> int:
    """Sends a result with a model card to the hub, into a private repository unless --public."""
    from kolotune.base_models import catalog
    from kolotune.publish import push as hub

    say = reporter(json)
    source = config_of({"hf_token": hf_token}).hf_token
    say.doing("reading what is pushed")
    parcel = hub.packed(RunFolder(run.absolute()), repository, what)
    if dry_run:
        say.result(parcel.card)
        say.note(f"{len(parcel.files)} files, {format_size(parcel.size)}; nothing was sent")
        return 0
    address = hub.push(parcel, repository, what, catalog.read_token(source), public, say)
    say.success(f"{'public' if public else 'private'}: {address}")
    return 0
