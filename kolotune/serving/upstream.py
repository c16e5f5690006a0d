"""A request to llama.cpp's server; a stream that answers it is read at a limited pace.

A small model makes a token every few milliseconds. If each one woke this process and the client, these would take the
cores from the threads that compute, which then wait for each other. So the first piece of a stream is passed on at
once, and then nothing is read before the next beat, the same one for all streams: what came meanwhile is one piece. A
model that takes longer for a token than from beat to beat is never delayed.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Mapping
from urllib.parse import urlsplit

from kolotune.foundation.closing import Closing

BEAT_SECONDS = 0.04
"""From one beat to the next: too short to be seen in a text that grows."""
_BYTES_AT_ONCE = 1 << 18


class Upstream(Closing):
    """A request and its response. A context manager.

    Args:
        address: of the server, such as "http://127.0.0.1:8080".
        path: what is asked for.
        headers: of the request, without those about its size.
        body: of the request.

    Attributes:
        status: of the response, once it has begun; so is the type.
        media_type: of the response.
    """

    def __init__(self, address: str, path: str, headers: Mapping[str, str], body: bytes) -> None:
        import h11

        self._address, self._h11 = urlsplit(address), h11
        self._connection = h11.Connection(h11.CLIENT)
        fields = {"Host": self._address.netloc, "Content-Length": str(len(body)), "Connection": "close", **headers}
        request = h11.Request(method="POST", target=path, headers=[*fields.items()])
        parts = (self._connection.send(event) for event in (request, h11.Data(data=body), h11.EndOfMessage()))
        self._request = b"".join(part or b"" for part in parts)
        self._socket = socket.socket(socket.AF_INET6 if ":" in str(self._address.hostname) else socket.AF_INET)
        self._socket.setblocking(False)
        self._early, self._ended = b"", False
        self.status, self.media_type = 0, ""

    def close(self) -> None:
        """Close the connection, which ends the computation."""
        self._socket.close()

    async def begin(self) -> None:
        """Send the request, and wait for the beginning of the response.

        Raises:
            OSError: the connection broke.
        """
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, (self._address.hostname, self._address.port))
        await loop.sock_sendall(self._socket, self._request)
        while not self.status:
            self._early += await self._arrived()

    async def whole(self) -> bytes:
        """Return the body of the response.

        Raises:
            OSError: the connection broke.
        """
        pieces = [self._early]
        while not self._ended:
            pieces.append(await self._arrived())
        return b"".join(pieces)

    async def pieces(self) -> AsyncGenerator[bytes]:
        """Yield the body as it grows, at most one piece for each beat.

        Raises:
            OSError: the connection broke.
        """
        clock = asyncio.get_running_loop().time
        piece = self._early
        while True:
            if piece:
                yield piece
            if self._ended:
                return
            if piece:
                await asyncio.sleep(BEAT_SECONDS - clock() % BEAT_SECONDS)
            piece = await self._arrived()

    async def _arrived(self) -> bytes:
        """Wait until something arrives; return what of it belongs to the body."""
        received = await asyncio.get_running_loop().sock_recv(self._socket, _BYTES_AT_ONCE)
        h11, body = self._h11, []
        try:
            self._connection.receive_data(received)
            while not self._ended and (event := self._connection.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Response):
                    headers = dict(event.headers)
                    self.status, self.media_type = event.status_code, headers.get(b"content-type", b"").decode()
                elif isinstance(event, h11.Data):
                    body.append(bytes(event.data))
                self._ended = isinstance(event, h11.EndOfMessage)
        except h11.RemoteProtocolError as error:
            raise ConnectionError(f"the response ended too early: {error}") from None
        return b"".join(body)
