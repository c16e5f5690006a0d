"""Errors of the hub's client as errors of the tree."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from kolotune.foundation.errors import KolotuneError, OfflineError
from kolotune.foundation.files import explained

E = TypeVar("E", bound=BaseException)
TRY_LATER = "Try again later; complete files are kept."
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def status_of(error: BaseException | None) -> int:
    """Return the HTTP status that the hub answered; 0 when there is none.

    The hub's client may hide the answer behind an error of its own.
    """
    while error is not None:
        if code := getattr(getattr(error, "response", None), "status_code", 0):
            return int(code)
        error = error.__cause__
    return 0


def connection_error(name: str, error: BaseException) -> KolotuneError:
    """Explain an error of the hub's client that is not an answer of the hub.

    Args:
        name: the model or repository.
        error: as the client raised it.
    """
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return explained(error, Path(error.filename or "."))
    chain = list(_chain(error))

    def among(*kinds: type[E]) -> E | None:
        return next((link for link in chain if isinstance(link, kinds)), None)

    if among(OfflineModeIsEnabled):
        return _unreachable(name, "HF_HUB_OFFLINE is set", "Unset it to download.")
    if among(socket.gaierror):
        request = getattr(among(httpx2.RequestError), "_request", None)
        host = request.url.host if request is not None else "of its host"
        return _unreachable(name, f"the name {host} can't be resolved")
    if among(httpx2.ConnectTimeout):
        return _unreachable(name, "it does not accept the connection")
    if among(httpx2.TimeoutException):
        return OfflineError(f"{name}: the hub stopped answering", TRY_LATER)
    if among(httpx2.ConnectError):
        return _unreachable(name, "the connection is refused" if among(ConnectionRefusedError) else "")
    if among(httpx2.NetworkError, httpx2.RemoteProtocolError):
        return OfflineError(f"{name}: the connection to the hub was lost", TRY_LATER)
    if "Consistency check failed" in str(error):  # a plain OSError
        return OfflineError(f"{name}: a file arrived with another size than the hub states", TRY_LATER)
    return _unreachable(name, "")


def _unreachable(name: str, reason: str, hint: str = "") -> OfflineError:
    hint = hint or "Check the network, and HF_ENDPOINT if it is set."
    return OfflineError(f"{name}: the hub can't be reached{': ' * bool(reason)}{reason}", hint)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
