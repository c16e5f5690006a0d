"""Limits to how long the hub's client waits.

By default it waits for an answer forever, also for a very slow one, and as long as the hub asks, which may be hours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kolotune.foundation.errors import OfflineError
from kolotune.foundation.formatting import format_duration

from .hub_errors import TRY_LATER

if TYPE_CHECKING:
    import httpx2

_LONGEST_WAIT = 60  # seconds that the hub may ask to wait before the next request
_SLOWEST = 1024  # bytes a second; less counts as silence
_MOST_RESTARTS = 5  # times that an interrupted file may be sent from its start


def silence_seconds() -> float:
    """Return the seconds of silence after which a download is retried or fails: HF_HUB_DOWNLOAD_TIMEOUT."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def limit_waiting(name: str, seconds: float) -> None:
    """Install limits in the hub's client for this process.

    Args:
        name: the model or repository, for messages.
        seconds: longest silence of the hub; trickling counts as silence.
    """
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    restarts: dict[str, int] = {}

    class SteadyStream(httpx2.SyncByteStream):
        """The body of a response; raises when it trickles."""

        def __init__(self, response: httpx2.Response) -> None:
            self._stream, self._request = response.stream, response.request

        def __iter__(self) -> Iterator[bytes]:
            assert isinstance(self._stream, httpx2.SyncByteStream)
            return _steady(self._stream, self._request, seconds)

        def close(self) -> None:
            if isinstance(self._stream, httpx2.SyncByteStream):
                self._stream.close()

    def limit_timeouts(request: httpx2.Request) -> None:
        timeouts = request.extensions.get("timeout", {})
        limits = {kind: min(timeouts.get(kind) or seconds, seconds) for kind in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": limits}

    def limit_response(response: httpx2.Response) -> None:
        _refuse_long_wait(name, response)
        if response.status_code == 200 and "range" in response.request.headers:
            url = str(response.request.url)
            restarts[url] = restarts.get(url, 0) + 1
            if restarts[url] > _MOST_RESTARTS:
                raise OfflineError(f"{name}: the connection to the hub is lost in the same file every time", TRY_LATER)
        response.stream = SteadyStream(response)

    def make_client() -> httpx2.Client:
        client = default_client_factory()
        client.event_hooks = {"request": [*client.event_hooks["request"], limit_timeouts], "response": [limit_response]}
        return client

    set_client_factory(make_client)


def _steady(stream: httpx2.SyncByteStream, request: httpx2.Request, seconds: float) -> Iterator[bytes]:
    """Yield from `stream` until it trickles; the time that the caller needs for the data does not count."""
    import httpx2

    waited, received, chunks = 0.0, 0, iter(stream)
    while True:
        started = time.monotonic()
        chunk = next(chunks, None)
        if chunk is None:
            return
        waited, received = waited + time.monotonic() - started, received + len(chunk)
        if waited > seconds:
            if received < waited * _SLOWEST:
                raise httpx2.ReadTimeout("the answer trickles", request=request)
            waited, received = 0.0, 0
        yield chunk


def _refuse_long_wait(name: str, response: httpx2.Response) -> None:
    waits = [response.headers.get("Retry-After", "")]
    waits += re.findall(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", response.headers.get("ratelimit", ""))
    seconds = max((int(wait) for wait in waits if wait.isdecimal()), default=0)
    if response.status_code in (429, 500, 502, 503, 504) and seconds > _LONGEST_WAIT:
        hint = f"Try again in {format_duration(seconds)}; complete files are kept."
        raise OfflineError(f"{name}: the hub answered {response.status_code} and asks to wait", hint)
