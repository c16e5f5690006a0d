"""The image and the container: built, started, stopped, looked at."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kolotune.foundation.errors import (
    ConfigError,
    ContainerMissingError,
    ImageBuildError,
    ImageMissingError,
    KolotuneError,
)
from kolotune.foundation.reporter import Progress, Reporter
from kolotune.foundation.secrets import HUB_TOKEN_VARIABLES
from kolotune.version import VERSION

from . import context, names
from .archive import Item, packed
from .docker import Docker, Found

GPUS = ("auto", "none", "nvidia", "amd")

_CERTIFICATES = "certificates.pem"
_STOP_SECONDS = 10
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class BuildOptions:
    """What a build may be given; None leaves it to the Dockerfile or to pip.

    Attributes:
        base: the base image, best pinned as ``name@sha256:…``.
        extra_index: one more package index for pip, such as PyTorch's for ROCm or for the CPU.
        wheels, ca_bundle, pip_config: see `context.write`.
        network: the network of the build's steps, as ``host``.
    """

    base: str | None = None
    extra_index: str | None = None
    wheels: Path | None = None
    ca_bundle: Path | None = None
    pip_config: Path | None = None
    network: str | None = None


def build(docker: Docker, options: BuildOptions, log: Path, reporter: Reporter) -> str:
    """Builds the image of this version of kolotune; returns its tag. What the steps print goes to `log`.

    Raises:
        ImageBuildError: a step failed.
    """
    arguments = {"VERSION": VERSION, "BASE": options.base, "EXTRA_INDEX": options.extra_index}
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as tar, log.open("w", encoding="utf-8") as output:
        context.write(tar, wheels=options.wheels, ca_bundle=options.ca_bundle, pip_config=options.pip_config)
        tar.seek(0)
        with docker.told("build the image"), reporter.progress("building the image") as progress:
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


def _follow(answers: Iterable[dict[str, Any]], output: IO[str], log: Path, progress: Progress, base: str) -> None:
    """Writes what the build's steps print, counts them, and raises what went wrong."""
    step, last, takes_base = "0", "", False
    for answer in answers:
        text = _COLOURS.sub("", str(answer.get("stream", "")))
        output.write(text)
        output.flush()
        if "error" in answer:
            if takes_base:
                raise ImageBuildError(
                    f"the base image {base} can't be had: {answer['error']}", "Check --base, and the network."
                )
            why = last or answer["error"]
            raise ImageBuildError(f"building the image failed in step {step}: {why}", f"The log is {log}.")
        if text.startswith("Step "):
            step = text.removeprefix("Step ").partition(" ")[0]
            takes_base, last = "FROM ${BASE}" in text, ""
            done, _, total = step.partition("/")
            progress.update(int(done), int(total))
        elif text.strip() and not text.startswith(("Removing ", " --->")):
            last = text.strip().splitlines()[-1]


@dataclass(frozen=True)
class StartOptions:
    """What a container is made with; it keeps that until it is made anew.

    Attributes:
        image: its image; None: that of this version of kolotune.
        network: Docker's network, as ``host`` or ``none``; None: Docker's default.
        gpus: one of `GPUS`.
        env: variables as NAME=VALUE.
        ports: port numbers, published on this machine's loopback only.
        ca_bundle: certificates in PEM that programs inside trust.
        anew: remove a container of that name first; its volume stays.
    """

    image: str | None = None
    network: str | None = None
    gpus: str = GPUS[0]
    env: Sequence[str] = ()
    ports: Sequence[int] = ()
    ca_bundle: Path | None = None
    anew: bool = False


def start(docker: Docker, name: str, options: StartOptions, reporter: Reporter) -> Found:
    """Makes the container if there is none, and starts it if it does not run.

    Raises:
        ImageMissingError: there is no image to make it from.
        ConfigError: a variable may not be given this way.
    """
    found = docker.find(name)
    if found is not None and options.anew:
        with docker.told(f"remove {name}"):
            docker.api.remove_container(found.id, force=True)
        found = None
    if found is None:
        _make(docker, name, options)
        reporter.success(f"made container {name}, with volume {names.volume_of(name)}")
    elif options != StartOptions():
        reporter.warning(f"container {name} is there already, and keeps the options it has; --anew makes it anew")
    elif found.image != _image_id(docker, names.image_tag()):
        reporter.warning(f"container {name} was made from another image than {names.image_tag()}; --anew makes it anew")
    with docker.told(f"start {name}"):
        if found is not None and found.state == "paused":
            docker.api.unpause(name)
        docker.api.start(name)
    started = docker.find(name)
    if started is None or started.state != "running":
        raise ContainerMissingError(f"container {name}: did not stay up", f"Look at `docker logs {name}`.")
    if (found is None or found.state not in ("running", "paused")) and started.version == VERSION:
        _sweep(docker, started)
    return started


def _sweep(docker: Docker, started: Found) -> None:
    """Frees what half-sent files take; in a container that has just been started nobody is sending any."""
    from .transfer import Volume

    with contextlib.suppress(KolotuneError):
        Volume(docker, started).ask("sweep", names.VOLUME)


def _make(docker: Docker, name: str, options: StartOptions) -> None:
    image = options.image or names.image_tag()
    if _image_id(docker, image) is None:
        raise ImageMissingError(f"there is no image {image}")
    env = _variables(options.env)
    if options.ca_bundle is not None:
        certificates = f"{names.VOLUME}/.{_CERTIFICATES}"
        env |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"), certificates)
    api = docker.api
    with docker.told(f"make {name}"):
        host = api.create_host_config(
            init=True,  # takes in what a killed process leaves behind
            binds={names.volume_of(name): {"bind": str(names.VOLUME), "mode": "rw"}},
            network_mode=options.network,
            port_bindings={port: ("127.0.0.1", port) for port in options.ports},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            shm_size="1g",  # PyTorch's processes share tensors through it
            **_gpus(docker, options.gpus),
        )
        made = api.create_container(
            image, name=name, hostname=name[:63], environment=env, ports=list(options.ports), host_config=host
        )
        if options.ca_bundle is not None:
            content = options.ca_bundle.read_bytes()
            api.put_archive(made["Id"], str(names.VOLUME), packed([Item(f".{_CERTIFICATES}", content)]))


def _image_id(docker: Docker, image: str) -> str | None:
    import docker.errors as errors

    with docker.told(f"look for {image}"):
        try:
            return str(docker.api.inspect_image(image)["Id"])
        except errors.NotFound:
            return None


def _variables(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise ConfigError(f"env: {name!r} is not of the form NAME=VALUE")
        if name in HUB_TOKEN_VARIABLES:
            raise ConfigError(
                f"env: {name} would be readable in the container's description",
                "Leave it in this machine's environment, or use --hf-token FILE: each verb takes it along.",
            )
        found[name] = value
    return found


def _gpus(docker: Docker, wanted: str) -> dict[str, Any]:
    """Docker's options for the GPUs: NVIDIA's by its runtime, AMD's as devices."""
    from docker.types import DeviceRequest

    info = docker.api.info()
    amd = [device for device in ("/dev/kfd", "/dev/dri") if Path(device).exists()]
    if wanted == "nvidia" or (wanted == "auto" and "nvidia" in (info.get("Runtimes") or {})):
        return {"device_requests": [DeviceRequest(count=-1, capabilities=[["gpu"]])]}
    if wanted == "amd" or (wanted == "auto" and "/dev/kfd" in amd):
        # The groups that own the devices; numbers, because the image's names may be others.
        groups = {str(Path(path).stat().st_gid) for path in ["/dev/kfd", *map(str, Path("/dev/dri").glob("render*"))]}
        return {"devices": [f"{device}:{device}:rwm" for device in amd], "group_add": sorted(groups)}
    return {}


def stop(docker: Docker, name: str) -> None:
    """Stops the container; its volume stays.

    Raises:
        ContainerMissingError, SimilarContainerError: there is none of that name.
    """
    found = docker.find(name)
    if found is None:
        raise docker.missing(name)
    with docker.told(f"stop {name}"):
        if found.state == "paused":
            docker.api.unpause(found.id)
        docker.api.stop(found.id, timeout=_STOP_SECONDS)


def described(docker: Docker, name: str) -> list[tuple[str, str, str]]:
    """Rows (part, state, what) about Docker, the image and the container."""
    from .transfer import Volume

    version = docker.api.version()
    rows = [("docker", "ok", f"{version.get('Version', '?')}, on {version.get('Os', '?')}/{version.get('Arch', '?')}")]
    image = _image_id(docker, names.image_tag())
    rows.append(("image", "ok" if image else "missing", names.image_tag() if image else "kolotune container build"))
    found = docker.find(name)
    if found is None:
        return [*rows, ("container", "missing", f"kolotune container start {name}")]
    note = "" if found.image == image else ", of another image: kolotune container start --anew"
    rows.append(("container", found.state, f"{name}{note}"))
    rows.append(("kolotune inside", "ok" if found.version == VERSION else "other", found.version or "none"))
    rows.append(("volume", "ok", names.volume_of(name)))
    if found.state == "running" and found.version == VERSION:
        from kolotune.foundation.formatting import format_size

        with contextlib.suppress(OSError):
            sizes = Volume(docker, found).ask("sizes", names.VOLUME)
            for folder, size in sizes.items():
                label = {".inputs": "files sent in", ".cache": "models and toolchain"}.get(folder, folder)
                rows.append(("on the volume", format_size(size), label))
    return rows
