"""Docker's engine: the connection, its errors as errors of the tree, and the state of a container."""

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

_DISK_FULL = ("no space left on device", "disk quota exceeded")
_RESUME = "finished stages are kept, and --use-checkpoint resumes training."
SPACE_HINT = "Free space where Docker keeps its volumes, or remove old runs with `kolotune container shell`."


@dataclass(frozen=True)
class Container:
    """A container as Docker describes it.

    Attributes:
        name, id: of the container.
        state: "running", "paused", "exited", "created", ….
        image: hash of the image that it was made from.
        version: of the kolotune in it; "" when it is not one of ours.
        started: time of its last start, as Docker writes it; another value means that it was restarted.
    """

    name: str
    id: str
    state: str
    image: str
    version: str
    started: str


class Docker:
    """A connection to Docker on this machine, or where DOCKER_HOST says.

    Attributes:
        api: the official client's low-level interface.

    Raises:
        DockerDownError: there is no answer, or this user has no permission.
    """

    def __init__(self) -> None:
        import docker
        import docker.errors

        try:
            self.api: Any = docker.APIClient(**docker.utils.kwargs_from_env(), version="auto")
        except (docker.errors.DockerException, OSError, ValueError) as error:
            raise _down_error(error) from None

    @contextlib.contextmanager
    def errors_for(self, action: str) -> Iterator[None]:
        """Turn Docker's errors in the block into ours; `action` is what was requested, as "start kolo_container"."""
        import docker.errors
        import requests
        import urllib3

        try:
            yield
        except docker.errors.APIError as error:
            text = str(error.explanation or error)
            if is_disk_full(text):
                raise SpaceError(f"{action}: the container's disk is full", SPACE_HINT) from None
            raise ContainerError(f"{action}: Docker says: {text.strip()}") from None
        except requests.exceptions.ReadTimeout:
            # While files go into a container or come out of it, Docker answers no other request about that one.
            raise ContainerError(
                f"{action}: Docker has not answered for {self.api.timeout} s",
                "If another command is copying large files, wait until it is done",
            ) from None
        # When a stream breaks, the error of the library below is raised.
        except (requests.exceptions.ConnectionError, urllib3.exceptions.ProtocolError, ConnectionError) as error:
            raise _down_error(error) from None
        except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
            raise ContainerError(f"{action}: {error}") from None

    def find(self, name: str) -> Container | None:
        """Return the container `name`; None when there is none of exactly that name."""
        import docker.errors

        with self.errors_for(f"look for {name}"):
            try:
                answer = self.api.inspect_container(name)
            except docker.errors.NotFound:
                return None
        if answer["Name"] != f"/{name}":  # Docker also takes the start of a container's id for a name
            return None
        state = answer["State"]
        return Container(
            name=name,
            id=answer["Id"],
            state=state["Status"],
            image=answer["Image"],
            version=(answer["Config"].get("Labels") or {}).get(names.VERSION_LABEL, ""),
            started=state["StartedAt"],
        )

    def require_running(self, name: str) -> Container:
        """Return the container `name`, ready for work.

        Raises:
            ContainerMissingError, SimilarContainerError: there is none of that name.
            ContainerPausedError, ContainerStoppedError: it does not run.
            ContainerVersionError: its kolotune is another version than this one.
        """
        container = self.find(name)
        if container is None:
            raise self.missing_error(name)
        if container.state == "paused":
            raise paused_error(name, "")
        if container.state != "running":
            raise ContainerStoppedError(f"container {name}: is not running ({container.state})")
        if container.version != VERSION:
            problem = (
                f"has kolotune {container.version}"
                if container.version
                else "was not made by `kolotune container start`"
            )
            raise ContainerVersionError(f"container {name}: {problem}, this is kolotune {VERSION}")
        return container

    def missing_error(self, name: str) -> ContainerMissingError | SimilarContainerError:
        with self.errors_for("list containers"):
            every = [text.lstrip("/") for entry in self.api.containers(all=True) for text in entry.get("Names") or []]
        similar = difflib.get_close_matches(name, every, n=1, cutoff=0.7)
        similar += [text for text in every if name in text or text in name]
        if similar:
            return SimilarContainerError(
                f"container {name}: does not exist, but {similar[0]} does",
                f"Use that one with --container={similar[0]}, or make this one: kolotune container start {name}",
            )
        return ContainerMissingError(f"container {name}: does not exist", f"Make it: kolotune container start {name}")

    def require_unchanged(self, container: Container, doing: str) -> Container:
        """Check that a container has been running since it was described; return its description now.

        It may be paused: nothing is lost by that.

        Raises:
            ContainerLostError: it was stopped, restarted or removed, or Docker was.
        """
        try:
            now = self.find(container.name)
        except DockerDownError:
            raise _docker_lost_error(container.name, doing) from None
        if now is None or now.id != container.id:
            raise lost_error(container.name, f"was removed during {doing}", "Make it again")
        if now.state not in ("running", "paused") or now.started != container.started:
            raise lost_error(container.name, f"was stopped or restarted during {doing}", "Start it")
        return now

    @contextlib.contextmanager
    def during(self, doing: str, container: Container, action: str = "") -> Iterator[None]:
        """`errors_for`, for work in a container: also notice that the container or Docker went away.

        Args:
            doing: what the work is called, as "train".
            container: its description when the work began.
            action: what was requested from Docker; the same as `doing` by default.

        Raises:
            ContainerLostError: the container was stopped, restarted or removed, or Docker was.
            ContainerPausedError: it is paused, and refuses this.
            SpaceError, ContainerError: see `errors_for`.
        """
        try:
            with self.errors_for(action or doing):
                yield
        except DockerDownError:
            # While Docker shuts down it takes no new connections, but reports on the old ones that all is well.
            raise _docker_lost_error(container.name, doing) from None
        except ContainerError:
            if self.require_unchanged(container, doing).state == "paused":
                raise paused_error(container.name, doing) from None
            raise


def is_disk_full(text: str) -> bool:
    """Whether an error message says that a disk is full."""
    return any(phrase in text.lower() for phrase in _DISK_FULL)


def paused_error(name: str, doing: str) -> ContainerPausedError:
    """Return the error for a paused container; `doing` is the interrupted work, or "" when none has begun."""
    hint = f"Resume it: docker unpause {name}, or kolotune container start {name}"
    return ContainerPausedError(f"container {name}: is paused{f', and {doing} is waiting' if doing else ''}", hint)


def lost_error(name: str, reason: str, first: str) -> ContainerLostError:
    """Return the error for a container that went away; `first` is what to do before the verb can run again."""
    return ContainerLostError(
        f"container {name}: {reason}",
        f"{first} (kolotune container start {name}), then run the same command again: {_RESUME}",
    )


def _docker_lost_error(name: str, doing: str) -> ContainerLostError:
    return lost_error(name, f"Docker went away during {doing}", "Start Docker and the container")


def _down_error(error: Exception) -> DockerDownError:
    text = str(error)
    if "Permission denied" in text or isinstance(error, PermissionError):
        return DockerDownError(
            "Docker can't be used: this account has no permission",
            "Add the account to the group `docker` and log in again, or use rootless Docker.",
        )
    if any(phrase in text.lower() for phrase in ("no such file", "not found", "connection refused")):
        return DockerDownError("Docker can't be reached: it is not running, or not installed")
    return DockerDownError(f"Docker can't be reached: {text.splitlines()[0] if text else type(error).__name__}")
