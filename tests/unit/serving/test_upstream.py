"""The pace at which a stream of llama.cpp's server is read, and what of it arrives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from support import bad_server

from kolotune.serving import upstream
from kolotune.serving.upstream import Upstream

EVENTS = [b"data: %d\n\n" % number for number in range(20)]


class Streaming(bad_server.Handler):
    """Answers with events: the first one, then all others at once; each is a chunk of its own."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.close_connection = True
        self.send_response(asked["status"])
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(EVENTS[0])
        if not asked["ends"]:
            return
        self.over.wait(asked["pause"])
        for event in EVENTS[1:]:
            self._chunk(event)
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


@pytest.fixture
def address() -> Iterator[str]:
    with bad_server.serving(Streaming) as url:
        yield url


def asked(address: str, pause: float = 0.0, ends: bool = True, status: int = 200) -> Upstream:
    body = json.dumps({"pause": pause, "ends": ends, "status": status}).encode()
    return Upstream(address, "/v1/chat/completions", {"Authorization": "Bearer key"}, body)


async def pieces(request: Upstream) -> list[bytes]:
    with request:
        await request.begin()
        assert (request.status, request.media_type) == (200, "text/event-stream")
        return [piece async for piece in request.pieces()]


def test_what_comes_within_a_beat_is_one_piece(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "BEAT_SECONDS", 0.5)

    async def read() -> list[bytes]:
        await asyncio.sleep(0.5 - asyncio.get_running_loop().time() % 0.5)  # all of a beat is left
        return await pieces(asked(address, pause=0.1))

    assert asyncio.run(read()) == [EVENTS[0], b"".join(EVENTS[1:])]


def test_what_comes_later_is_not_delayed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a beat without anything, the next piece is passed on when it comes, not at a beat."""
    beats: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        beats.append(seconds)
        await real_sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    got = asyncio.run(pieces(asked(address, pause=5 * upstream.BEAT_SECONDS)))
    assert b"".join(got) == b"".join(EVENTS) and got[0] == EVENTS[0]
    assert len(beats) <= len(got) and all(0 < beat <= upstream.BEAT_SECONDS for beat in beats)


def test_a_whole_response(address: str) -> None:
    async def read() -> tuple[bytes, int]:
        with asked(address, status=400) as request:
            await request.begin()
            return await request.whole(), request.status

    assert asyncio.run(read()) == (b"".join(EVENTS), 400)


def test_a_broken_connection_is_an_error(address: str) -> None:
    with pytest.raises(OSError, match="ended too early"):
        asyncio.run(pieces(asked(address, ends=False)))
    with pytest.raises(OSError):
        asyncio.run(pieces(asked("http://127.0.0.1:1")))


def test_the_end_of_the_block_closes_the_connection() -> None:
    """So that llama.cpp stops computing."""
    closed: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"3\r\nabc\r\n")
        closed.append(await reader.read())
        writer.close()

    async def leave() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with Upstream(f"http://127.0.0.1:{port}", "/", {}, b"{}") as request:
                await request.begin()
                assert await anext(request.pieces()) == b"abc"
            while not closed:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), 20))
    assert closed == [b""]
