"""Docker's engine: the connection, its errors in the user's words, and the state of a container."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kolotune.foundation.errors import (
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
from kolotune.version import VERSION

from . import names

_FULL = ("no space left on device", "disk quota exceeded")
_KEPT = "what was done stays, and --use-checkpoint goes on in mid-training."
SPACE_HINT = "Free space where Docker keeps its volumes, or remove old runs with `kolotune container shell`."


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
        import urllib3

        try:
            yield
        except docker.errors.APIError as error:
            words = str(error.explanation or error)
            if is_full(words):
                raise SpaceError(f"{what}: the container's disk is full", SPACE_HINT) from None
            raise ContainerError(f"{what}: Docker says: {words.strip()}") from None
        except requests.exceptions.ReadTimeout:
            # As long as files go into a container or come out of it, Docker answers nothing else about that one.
            raise ContainerError(
                f"{what}: Docker has not answered for {self.api.timeout} s",
                "Wait until it is done with the large files of another command, if there is one",
            ) from None
        # A stream that breaks is told by the library below, as it is.
        except (requests.exceptions.ConnectionError, urllib3.exceptions.ProtocolError, ConnectionError) as error:
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
            version=(seen["Config"].get("Labels") or {}).get(names.VERSION_LABEL, ""),
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
            raise paused(name, "")
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

    def require_unchanged(self, found: Found, doing: str) -> Found:
        """Checks that the container has been running all the time since it was `found`; returns it as it is now.

        It may be paused: that loses nothing.

        Raises:
            ContainerLostError: it was stopped, restarted or removed, or Docker was.
        """
        try:
            now = self.find(found.name)
        except DockerDownError:
            raise _left_by_docker(found.name, doing) from None
        if now is None or now.id != found.id:
            raise lost(found.name, f"was removed during {doing}", "Make it again")
        if now.state not in ("running", "paused") or now.started != found.started:
            raise lost(found.name, f"was stopped or restarted during {doing}", "Start it")
        return now

    @contextlib.contextmanager
    def working(self, found: Found, doing: str, what: str = "") -> Iterator[None]:
        """`told`, for work in a container: when it fails because the container or Docker went away, that is told.

        Args:
            found: the container, as it was when the work began.
            doing: what the work is called, as "train".
            what: what was asked of Docker; default: the same.

        Raises:
            ContainerLostError: the container was stopped, restarted or removed, or Docker was.
            ContainerPausedError: it is paused, and does not take this.
            SpaceError, ContainerError: as `told` has them.
        """
        try:
            with self.told(what or doing):
                yield
        except DockerDownError:
            # One that is about to stop takes no new connections, and still says of the old ones that all is well.
            raise _left_by_docker(found.name, doing) from None
        except ContainerError:
            if self.require_unchanged(found, doing).state == "paused":
                raise paused(found.name, doing) from None
            raise


def is_full(words: str) -> bool:
    """Whether an error's text says that a disk is full."""
    return any(each in words.lower() for each in _FULL)


def paused(name: str, doing: str) -> ContainerPausedError:
    """The error about a container that is paused under what a verb does; "" when nothing has begun."""
    how = f"docker unpause {name}, or kolotune container start {name}"
    if not doing:
        return ContainerPausedError(f"container {name}: is paused", f"Let it go on: {how}")
    return ContainerPausedError(f"container {name}: is paused, and {doing} stands still", f"Let it go on: {how}")


def lost(name: str, why: str, first: str) -> ContainerLostError:
    """The error about a container that a verb was running in; `first` is to be done before it runs again."""
    return ContainerLostError(
        f"container {name}: {why}",
        f"{first} (kolotune container start {name}), then run the same command again: {_KEPT}",
    )


def _left_by_docker(name: str, doing: str) -> ContainerLostError:
    return lost(name, f"Docker went away during {doing}", "Start Docker and the container")


def _down(error: Exception) -> DockerDownError:
    words = str(error)
    if "Permission denied" in words or isinstance(error, PermissionError):
        return DockerDownError(
            "Docker can't be used: this account may not talk to it",
            "Add the account to the group `docker` and log in again, or use rootless Docker.",
        )
    if any(each in words.lower() for each in ("no such file", "not found", "connection refused")):
        return DockerDownError("Docker can't be reached: it is not running, or not installed")
    return DockerDownError(f"Docker can't be reached: {words.splitlines()[0] if words else type(error).__name__}")
