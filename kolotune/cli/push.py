"""The verb `push`: upload a result to the hub."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from kolotune.foundation.config import OPTIONS
from kolotune.foundation.formatting import format_size
from kolotune.run_folder.layout import RunFolder

from .options import reporter, resolve_flags
from .parameters import FileRole, Json, Run


def push(
    run: Run,
    repository: Annotated[str, typer.Argument(help="The repository on the hub: owner/name.")],
    what: Annotated[Literal["adapter", "merged", "gguf"], typer.Option(help="What to upload.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the model card and the files; upload nothing.")
    ] = False,
    hf_token: Annotated[str | None, typer.Option(help=OPTIONS["hf_token"].help), FileRole.NOT_SENT] = None,
    json: Json = False,
) -> int:
    """Upload a result to the hub; private unless --public."""
    from kolotune.base_models.hub import read_token
    from kolotune.publish.push import push as push_upload
    from kolotune.publish.upload import collect_upload

    say = reporter(json)
    source = resolve_flags({"hf_token": hf_token}).hf_token
    say.doing("reading the files")
    upload = collect_upload(RunFolder(run.absolute()), repository, what)
    if dry_run:
        say.result(upload.card)
        say.note(f"{len(upload.files)} files, {format_size(upload.size)}; nothing was uploaded")
        return 0
    address = push_upload(upload, repository, what, read_token(source), public, say)
    say.success(f"{'public' if public else 'private'}: {address}")
    return 0
