"""Start, stop and describe the container."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.errors import ConfigError, ContainerMissingError, ImageMissingError, KolotuneError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.secrets import HUB_TOKEN_VARIABLES
from kolotune.version import VERSION

from . import names
from .archive import ArchiveFile, pack
from .docker import Container, Docker
from .volume import Volume

GPUS = ("auto", "none", "nvidia", "amd")

_CERTIFICATES = "certificates.pem"
_STOP_SECONDS = 10


@dataclass(frozen=True)
class StartOptions:
    """Options that a container keeps until it is made again.

    Attributes:
        image: its image; None: that of this version of kolotune.
        network: Docker's network, such as ``host`` or ``none``; None: Docker's default.
        gpus: one of `GPUS`.
        env: variables as NAME=VALUE.
        ports: port numbers, published on this machine's loopback only.
        ca_bundle: certificates in PEM that programs inside trust.
        recreate: remove a container of that name first; its volume is kept.
    """

    image: str | None = None
    network: str | None = None
    gpus: str = GPUS[0]
    env: Sequence[str] = ()
    ports: Sequence[int] = ()
    ca_bundle: Path | None = None
    recreate: bool = False


def start(docker: Docker, name: str, options: StartOptions, reporter: Reporter) -> Container:
    """Start the container, and make it first if it does not exist.

    Raises:
        ImageMissingError: there is no image to make it from.
        ConfigError: a variable may not be set this way.
    """
    container = docker.find(name)
    if container is not None and options.recreate:
        with docker.errors_for(f"remove {name}"):
            docker.api.remove_container(container.id, force=True)
        container = None
    if container is None:
        _create(docker, name, options)
        reporter.success(f"made container {name}, with volume {names.volume_of(name)}")
    elif options != StartOptions():
        reporter.warning(f"container {name} exists, and keeps the options it has; --anew makes it again")
    elif container.image != _image_id(docker, names.image_tag()):
        reporter.warning(
            f"container {name} was made from another image than {names.image_tag()}; --anew makes it again"
        )
    with docker.errors_for(f"start {name}"):
        if container is not None and container.state == "paused":
            docker.api.unpause(name)
        docker.api.start(name)
    started = docker.find(name)
    if started is None or started.state != "running":
        raise ContainerMissingError(f"container {name}: stopped right after its start", f"See `docker logs {name}`.")
    if (container is None or container.state not in ("running", "paused")) and started.version == VERSION:
        _remove_partial_files(docker, started)
    return started


def _remove_partial_files(docker: Docker, started: Container) -> None:
    """Remove files that were sent in part; nobody sends any to a container that has just been started."""
    with contextlib.suppress(KolotuneError):
        Volume(docker, started).ask(type(None), "sweep", names.VOLUME)


def _create(docker: Docker, name: str, options: StartOptions) -> None:
    image = options.image or names.image_tag()
    if _image_id(docker, image) is None:
        raise ImageMissingError(f"there is no image {image}")
    env = _variables(options.env)
    if options.ca_bundle is not None:
        certificates = f"{names.VOLUME}/.{_CERTIFICATES}"
        env |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"), certificates)
    api = docker.api
    with docker.errors_for(f"make {name}"):
        host = api.create_host_config(
            init=True,  # collects the processes that a killed one leaves behind
            binds={names.volume_of(name): {"bind": str(names.VOLUME), "mode": "rw"}},
            network_mode=options.network,
            port_bindings={port: ("127.0.0.1", port) for port in options.ports},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            shm_size="1g",  # PyTorch's processes share tensors through it
            **_gpu_options(docker, options.gpus),
        )
        created = api.create_container(
            image, name=name, hostname=name[:63], environment=env, ports=list(options.ports), host_config=host
        )
        if options.ca_bundle is not None:
            file = ArchiveFile(f".{_CERTIFICATES}", options.ca_bundle.read_bytes())
            api.put_archive(created["Id"], str(names.VOLUME), pack([file]))


def _image_id(docker: Docker, image: str) -> str | None:
    import docker.errors as errors

    with docker.errors_for(f"look for {image}"):
        try:
            return str(docker.api.inspect_image(image)["Id"])
        except errors.NotFound:
            return None


def _variables(assignments: Sequence[str]) -> dict[str, str]:
    variables = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"env: {name!r} is not of the form NAME=VALUE")
        if name in HUB_TOKEN_VARIABLES:
            raise ConfigError(
                f"env: {name} would be readable in the container's description",
                "Set it in this machine's environment, or use --hf-token FILE: each verb passes it on.",
            )
        variables[name] = value
    return variables


def _gpu_options(docker: Docker, choice: str) -> dict[str, object]:
    """Return Docker's options for the GPUs: NVIDIA's by its runtime, AMD's as devices."""
    from docker.types import DeviceRequest

    info = docker.api.info()
    amd = [device for device in ("/dev/kfd", "/dev/dri") if Path(device).exists()]
    if choice == "nvidia" or (choice == "auto" and "nvidia" in (info.get("Runtimes") or {})):
        return {"device_requests": [DeviceRequest(count=-1, capabilities=[["gpu"]])]}
    if choice == "amd" or (choice == "auto" and "/dev/kfd" in amd):
        # The groups that own the devices; as numbers, because the image may name them differently.
        groups = {str(Path(path).stat().st_gid) for path in ["/dev/kfd", *map(str, Path("/dev/dri").glob("render*"))]}
        return {"devices": [f"{device}:{device}:rwm" for device in amd], "group_add": sorted(groups)}
    return {}


def stop(docker: Docker, name: str) -> None:
    """Stop the container; its volume is kept.

    Raises:
        ContainerMissingError, SimilarContainerError: there is none of that name.
    """
    container = docker.find(name)
    if container is None:
        raise docker.missing_error(name)
    with docker.errors_for(f"stop {name}"):
        if container.state == "paused":
            docker.api.unpause(container.id)
        docker.api.stop(container.id, timeout=_STOP_SECONDS)


def status_rows(docker: Docker, name: str) -> list[tuple[str, str, str]]:
    """Return rows (part, state, what) about Docker, the image and the container."""
    version = docker.api.version()
    rows = [("docker", "ok", f"{version.get('Version', '?')}, on {version.get('Os', '?')}/{version.get('Arch', '?')}")]
    image = _image_id(docker, names.image_tag())
    rows.append(("image", "ok" if image else "missing", names.image_tag() if image else "kolotune container build"))
    container = docker.find(name)
    if container is None:
        return [*rows, ("container", "missing", f"kolotune container start {name}")]
    note = "" if container.image == image else ", of another image: kolotune container start --anew"
    rows.append(("container", container.state, f"{name}{note}"))
    rows.append(("kolotune inside", "ok" if container.version == VERSION else "other", container.version or "none"))
    rows.append(("volume", "ok", names.volume_of(name)))
    if container.state == "running" and container.version == VERSION:
        with contextlib.suppress(OSError):
            for folder, size in Volume(docker, container).ask(dict[str, int], "sizes", names.VOLUME).items():
                label = {".inputs": "input files", ".cache": "models and toolchain"}.get(folder, folder)
                rows.append(("on the volume", format_size(size), label))
    return rows
