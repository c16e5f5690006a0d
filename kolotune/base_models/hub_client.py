"""How the hub is asked: by its own client, with an end to its patience; and what went wrong, in the user's words."""

from __future__ import annotations

import errno
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import KolotuneError, OfflineError
from kolotune.foundation.files import explained
from kolotune.foundation.formatting import format_duration

_PATIENCE_SECONDS = 60  # for what the hub asks to wait before it is asked again
_SLOWEST = 1024  # bytes a second; fewer count as silence
_BEGUN_AGAIN = 5  # so often a file that broke off may be sent from its beginning
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
LATER = "Try again later; finished files are kept."


def silence() -> float:
    """Seconds without an answer after which a download gives up or tries again: the hub's HF_HUB_DOWNLOAD_TIMEOUT."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def limit_patience(name: str, seconds: float) -> None:
    """Makes the hub's client give up in the end, from here on.

    By itself it waits for an answer for ever, for a slow one too, and as long as the hub asks, hours if need be.

    Args:
        name: what is asked for, for messages.
        seconds: that the hub may be silent for, or as good as silent.
    """
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    begun_again: dict[str, int] = {}

    class Watched(httpx2.SyncByteStream):
        """An answer's body that must not trickle."""

        def __init__(self, response: Any) -> None:
            self._stream, self._request = response.stream, response.request

        def __iter__(self) -> Iterator[bytes]:
            return _steadily(self._stream, self._request, seconds)

        def close(self) -> None:
            self._stream.close()

    def limit(request: Any) -> None:
        asked = request.extensions.get("timeout", {})
        limits = {kind: min(asked.get(kind) or seconds, seconds) for kind in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": limits}

    def watch(response: Any) -> None:
        _refuse_long_waits(name, response)
        if response.status_code == 200 and "range" in response.request.headers:
            place = str(response.request.url)
            begun_again[place] = begun_again.get(place, 0) + 1
            if begun_again[place] > _BEGUN_AGAIN:
                raise OfflineError(f"{name}: the connection to the hub breaks off in the same file every time", LATER)
        response.stream = Watched(response)

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks = {"request": [*made.event_hooks["request"], limit], "response": [watch]}
        return made

    set_client_factory(client)


def _steadily(stream: Any, request: Any, seconds: float) -> Iterator[bytes]:
    """What comes from `stream`, until it is as good as silent; what is done with it meanwhile takes no part."""
    import httpx2

    waited, received, coming = 0.0, 0, iter(stream)
    while True:
        asked = time.monotonic()
        chunk = next(coming, None)
        if chunk is None:
            return
        waited, received = waited + time.monotonic() - asked, received + len(chunk)
        if waited > seconds:
            if received < waited * _SLOWEST:
                raise httpx2.ReadTimeout("the answer trickles", request=request)
            waited, received = 0.0, 0
        yield chunk


def _refuse_long_waits(name: str, response: Any) -> None:
    asked = [response.headers.get("Retry-After", "")]
    asked += re.findall(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", response.headers.get("ratelimit", ""))
    seconds = max((int(each) for each in asked if each.isdecimal()), default=0)
    if response.status_code in (429, 500, 502, 503, 504) and seconds > _PATIENCE_SECONDS:
        hint = f"Try again in {format_duration(seconds)}; finished files are kept."
        raise OfflineError(f"{name}: the hub answered {response.status_code} and asks to wait", hint)


def status_of(error: BaseException | None) -> int:
    """What the hub answered; 0 when it did not. The hub's client hides the answer behind an error of its own."""
    while error is not None:
        if code := getattr(getattr(error, "response", None), "status_code", 0):
            return int(code)
        error = error.__cause__
    return 0


def without_answer(name: str, error: BaseException) -> KolotuneError:
    """An error that is no answer of the hub, in the user's words: why there was none, or none that is whole.

    Args:
        name: what was asked for.
        error: as the hub's client raised it.
    """
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return explained(error, Path(error.filename or "."))
    chain = list(_chain(error))

    def among(*kinds: type[BaseException]) -> Any:
        return next((each for each in chain if isinstance(each, kinds)), None)

    if among(OfflineModeIsEnabled):
        return _unreached(name, "HF_HUB_OFFLINE is set", "Unset it for that.")
    if among(socket.gaierror):
        host = getattr(getattr(among(httpx2.RequestError), "_request", None), "url", None)
        return _unreached(name, f"the name {host.host if host else 'of its host'} can't be resolved")
    if among(httpx2.ConnectTimeout):
        return _unreached(name, "it does not take the connection")
    if among(httpx2.TimeoutException):
        return OfflineError(f"{name}: the hub stopped answering", LATER)
    if among(httpx2.ConnectError):
        return _unreached(name, "the connection is refused" if among(ConnectionRefusedError) else "")
    if among(httpx2.NetworkError, httpx2.RemoteProtocolError):
        return OfflineError(f"{name}: the connection to the hub broke off", LATER)
    if "Consistency check failed" in str(error):  # it is a plain OSError
        return OfflineError(f"{name}: a file came shorter or longer than the hub says it is", LATER)
    return _unreached(name, "")


def _unreached(name: str, why: str, hint: str = "") -> OfflineError:
    hint = hint or "Check the network, and HF_ENDPOINT where it is set."
    return OfflineError(f"{name}: the hub can't be reached{': ' * bool(why)}{why}", hint)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
