"""Build the container's image."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kolotune.foundation.errors import ImageBuildError
from kolotune.foundation.reporter import Progress, Reporter
from kolotune.version import VERSION

from . import build_context, names
from .docker import Docker

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build; None leaves the choice to the Dockerfile or to pip.

    Attributes:
        base: the base image, best pinned as ``name@sha256:…``.
        extra_index: one more package index for pip, such as PyTorch's for ROCm or for the CPU.
        wheels, ca_bundle, pip_config: see `build_context.write`.
        network: the network of the build's steps, such as ``host``.
    """

    base: str | None = None
    extra_index: str | None = None
    wheels: Path | None = None
    ca_bundle: Path | None = None
    pip_config: Path | None = None
    network: str | None = None


def build_image(docker: Docker, options: BuildOptions, log: Path, reporter: Reporter) -> str:
    """Build the image for this version of kolotune; return its tag. The output of its steps goes to `log`.

    Raises:
        ImageBuildError: a step failed.
    """
    arguments = {"VERSION": VERSION, "BASE": options.base, "EXTRA_INDEX": options.extra_index}
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as tar, log.open("w", encoding="utf-8") as output:
        build_context.write(tar, wheels=options.wheels, ca_bundle=options.ca_bundle, pip_config=options.pip_config)
        tar.seek(0)
        with docker.errors_for("build the image"), reporter.progress("building the image") as progress:
            answers = docker.api.build(
                fileobj=tar,
                custom_context=True,
                tag=names.image_tag(),
                buildargs={name: value for name, value in arguments.items() if value is not None},
                network_mode=options.network,
                rm=True,
                forcerm=True,
                decode=True,
                timeout=None,
            )
            _follow(answers, output, log, progress, options.base or "of the Dockerfile")
    return names.image_tag()


def _follow(answers: Iterable[Mapping[str, object]], output: IO[str], log: Path, progress: Progress, base: str) -> None:
    """Log the output of the build's steps, count the steps, and raise a failure."""
    step, last_line, pulls_base = "0", "", False
    for answer in answers:
        text = _COLOURS.sub("", str(answer.get("stream", "")))
        output.write(text)
        output.flush()
        if "error" in answer:
            if pulls_base:
                raise ImageBuildError(
                    f"the base image {base} can't be pulled: {answer['error']}", "Check --base, and the network."
                )
            reason = last_line or answer["error"]
            raise ImageBuildError(f"building the image failed in step {step}: {reason}", f"The log is {log}.")
        if text.startswith("Step "):
            step = text.removeprefix("Step ").partition(" ")[0]
            pulls_base, last_line = "FROM ${BASE}" in text, ""
            done, _, total = step.partition("/")
            progress.update(int(done), int(total))
        elif text.strip() and not text.startswith(("Removing ", " --->")):
            last_line = text.strip().splitlines()[-1]
