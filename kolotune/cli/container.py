"""The verbs of the container: build, start, stop, status, shell."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from kolotune.foundation.errors import ConfigError
from kolotune.runners.container import names

from .options import reporter
from .parameters import Json

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]+")  # Docker's own rule

Name = Annotated[str, typer.Argument(help="The container's name.")]
Certificates = Annotated[
    Path | None, typer.Option("--ca-bundle", help="Certificates in PEM to trust, behind a proxy.", show_default=False)
]

app = typer.Typer(
    help="Manage the container that --container sends verbs into.", no_args_is_help=True, rich_markup_mode=None
)


def build(
    base: Annotated[
        str | None,
        typer.Option(help="Base image, best pinned as name@sha256:…; default: a slim Python.", show_default=False),
    ] = None,
    extra_index: Annotated[
        str | None,
        typer.Option(help="Extra package index for pip, such as PyTorch's for CPU or ROCm.", show_default=False),
    ] = None,
    wheels: Annotated[Path | None, typer.Option(help="Folder of wheels that pip prefers.", show_default=False)] = None,
    pip_config: Annotated[
        Path | None, typer.Option(help="pip's settings for the build only.", show_default=False)
    ] = None,
    ca_bundle: Certificates = None,
    network: Annotated[
        str | None, typer.Option(help="Network of the build's steps, such as host.", show_default=False)
    ] = None,
    json: Json = False,
) -> int:
    """Build the image; unchanged layers are reused."""
    from kolotune.foundation.cache import cache_folder
    from kolotune.runners.container.build import BuildOptions, build_image
    from kolotune.runners.container.docker import Docker

    say = reporter(json)
    options = BuildOptions(base, extra_index, wheels, ca_bundle, pip_config, network)
    tag = build_image(Docker(), options, cache_folder("container") / "build.log", say)
    say.success(f"built {tag}")
    say.note("next: kolotune container start")
    return 0


def start(
    name: Name = names.DEFAULT_NAME,
    anew: Annotated[
        bool, typer.Option("--anew", help="Remove the container and make it again; keep its volume.")
    ] = False,
    image: Annotated[
        str | None, typer.Option(help="Its image; default: that of `kolotune container build`.", show_default=False)
    ] = None,
    gpus: Annotated[str, typer.Option(metavar="auto|none|nvidia|amd", help="GPUs to pass through.")] = "auto",
    env: Annotated[
        list[str] | None,
        typer.Option(help="Variable inside, such as HSA_OVERRIDE_GFX_VERSION=10.3.0.", show_default=False),
    ] = None,
    port: Annotated[
        list[int] | None,
        typer.Option(help="Port to publish, on this machine's loopback only.", show_default=False, min=1, max=65535),
    ] = None,
    network: Annotated[str | None, typer.Option(help="Docker's network, such as host.", show_default=False)] = None,
    ca_bundle: Certificates = None,
    json: Json = False,
) -> int:
    """Start the container; make it first, with its volume, if needed."""
    from kolotune.runners.container import lifecycle
    from kolotune.runners.container.docker import Docker

    if gpus not in lifecycle.GPUS:
        raise ConfigError(f"gpus: must be one of {', '.join(lifecycle.GPUS)}, not {gpus!r}")
    if ca_bundle is not None and not ca_bundle.is_file():
        raise ConfigError(f"{ca_bundle}: there is no such file", "Give the proxy's certificates in PEM.")
    say = reporter(json)
    options = lifecycle.StartOptions(image, network, gpus, tuple(env or ()), tuple(port or ()), ca_bundle, anew)
    lifecycle.start(Docker(), _checked(name), options, say)
    say.success(f"container {name} is running")
    return 0


def stop(name: Name = names.DEFAULT_NAME, json: Json = False) -> int:
    """Stop the container; keep the volume with its runs."""
    from kolotune.runners.container import lifecycle
    from kolotune.runners.container.docker import Docker

    lifecycle.stop(Docker(), _checked(name))
    reporter(json).success(f"container {name} is stopped; its runs are kept")
    return 0


def status(name: Name = names.DEFAULT_NAME, json: Json = False) -> int:
    """Show Docker, the image, the container and its volume."""
    from kolotune.runners.container import lifecycle
    from kolotune.runners.container.docker import Docker

    rows = lifecycle.status_rows(Docker(), _checked(name))
    reporter(json).table(f"Container {name}", ("part", "state", "what"), rows)
    return 0


def shell(name: Name = names.DEFAULT_NAME) -> int:
    """Open a shell in the container; needs the `docker` program."""
    from kolotune.runners import local
    from kolotune.runners.container.docker import Docker

    container = Docker().require_running(_checked(name))
    program = shutil.which("docker")
    if program is None:
        raise ConfigError(
            "shell: there is no `docker` program on this machine", "Install it; the other verbs don't need it."
        )
    tty = ["--tty"] if sys.stdin.isatty() else []  # commands may come through a pipe
    return local.run_interactive([program, "exec", "--interactive", *tty, container.id, "/bin/bash"])


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"container {name!r}: is not a valid name for Docker",
            "Use letters and digits, followed by any of them or _ . -",
        )
    return name


for _verb in (build, start, stop, status, shell):
    app.command()(_verb)
