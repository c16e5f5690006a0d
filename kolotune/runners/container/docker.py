"""Docker's engine: the connection, its errors in the user's words, and the state of a container."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import (
    ContainerError,
    ContainerLostError,
    ContainerMissingError,
    ContainerPausedError,
    ContainerStoppedError,
    ContainerVersionError,
    DockerDownError,
    SimilarContainerError,
    SpaceError,
)
from ...version import VERSION
from . import places

_FULL = ("no space left on device", "disk quota exceeded")


@dataclass(frozen=True)
class Found:
    """A container as Docker describes it.

    Attributes:
        name, id: of the container.
        state: "running", "paused", "exited", "created", ….
        image: hash of the image that it was made from.
        version: of the kolotune in it; "" when it is not one of ours.
        started: when it was last started, as Docker writes it; another value means that it was restarted.
    """

    name: str
    id: str
    state: str
    image: str
    version: str
    started: str


class Docker:
    """A connection to Docker, where DOCKER_HOST says or on this machine.

    Attributes:
        api: the official client's low-level interface.

    Raises:
        DockerDownError: nobody answers there, or this user may not ask.
    """

    def __init__(self) -> None:
        import docker
        import docker.errors

        try:
            self.api: Any = docker.APIClient(**docker.utils.kwargs_from_env(), version="auto")
        except (docker.errors.DockerException, OSError, ValueError) as error:
            raise _down(error) from None

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Turns Docker's errors in the block into ours; `what` is what was asked for, as "start kolo_container"."""
        import docker.errors
        import requests

        try:
            yield
        except docker.errors.APIError as error:
            words = str(error.explanation or error)
            if any(each in words.lower() for each in _FULL):
                raise SpaceError(
                    f"{what}: the container's disk is full",
                    "Free space where Docker keeps its volumes, or remove old runs with `kolotune container shell`.",
                ) from None
            raise ContainerError(f"{what}: Docker says: {words.strip()}") from None
        except (requests.exceptions.ConnectionError, ConnectionError) as error:
            raise _down(error) from None
        except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
            raise ContainerError(f"{what}: {error}") from None

    def find(self, name: str) -> Found | None:
        """The container `name`; None when there is none of exactly that name."""
        import docker.errors

        with self.told(f"look for {name}"):
            try:
                seen = self.api.inspect_container(name)
            except docker.errors.NotFound:
                return None
        if seen["Name"] != f"/{name}":  # Docker takes the beginning of a container's number for a name too
            return None
        state = seen["State"]
        return Found(
            name=name,
            id=seen["Id"],
            state=state["Status"],
            image=seen["Image"],
            version=(seen["Config"].get("Labels") or {}).get(places.VERSION_LABEL, ""),
            started=state["StartedAt"],
        )

    def running(self, name: str) -> Found:
        """The container `name`, ready to work with.

        Raises:
            ContainerMissingError, SimilarContainerError: there is none of that name.
            ContainerPausedError, ContainerStoppedError: it does not run.
            ContainerVersionError: its kolotune is not this one.
        """
        found = self.find(name)
        if found is None:
            raise self.missing(name)
        if found.state == "paused":
            raise ContainerPausedError(f"container {name}: is paused")
        if found.state != "running":
            raise ContainerStoppedError(f"container {name}: is not running ({found.state})")
        if found.version != VERSION:
            there = f"has kolotune {found.version}" if found.version else "was not made by `kolotune container start`"
            raise ContainerVersionError(f"container {name}: {there}, this is kolotune {VERSION}")
        return found

    def missing(self, name: str) -> ContainerMissingError | SimilarContainerError:
        with self.told("list containers"):
            every = [each.lstrip("/") for entry in self.api.containers(all=True) for each in entry.get("Names") or []]
        near = difflib.get_close_matches(name, every, n=1, cutoff=0.7)
        near += [each for each in every if name in each or each in name]
        if near:
            return SimilarContainerError(
                f"container {name}: there is none, only one named {near[0]}",
                f"Use that one with --container={near[0]}, or make this one: kolotune container start {name}",
            )
        return ContainerMissingError(f"container {name}: there is none", f"Make it: kolotune container start {name}")

    def require_unchanged(self, found: Found, doing: str) -> None:
        """Checks that the container has been running all the time since it was `found`.

        Raises:
            ContainerLostError: it was stopped, restarted or removed.
        """
        try:
            now = self.find(found.name)
        except DockerDownError:
            raise ContainerLostError(f"container {found.name}: Docker went away during {doing}") from None
        if now is None or now.id != found.id:
            raise ContainerLostError(f"container {found.name}: was removed during {doing}")
        if now.state not in ("running", "paused") or now.started != found.started:
            raise ContainerLostError(f"container {found.name}: was stopped or restarted during {doing}")


def _down(error: Exception) -> DockerDownError:
    words = str(error)
    if "Permission denied" in words or isinstance(error, PermissionError):
        return DockerDownError(
            "Docker can't be used: this account may not talk to it",
            "Add the account to the group `docker` and log in again, or use rootless Docker.",
        )
    if "No such file" in words or "not found" in words.lower():
        return DockerDownError("Docker can't be reached: it is not running, or not installed")
    return DockerDownError(f"Docker can't be reached: {words.splitlines()[0] if words else type(error).__name__}")
