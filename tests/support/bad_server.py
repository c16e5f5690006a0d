"""A server on this machine that does wrong on purpose: silent, slow, cut, dropped, whatever its handler says."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """What handlers of the tests need; `do_GET` is theirs."""

    protocol_version = "HTTP/1.1"
    over: threading.Event

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def begin(self, code: int, length: int, **headers: str) -> None:
        """Status and headers."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def hold(self) -> None:
        """Says nothing more, until the server ends."""
        self.close_connection = True
        self.over.wait()

    def trickle(self, body: bytes) -> None:
        """A byte now and then: more often than any silence is told by."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            for at in range(len(body)):
                self.wfile.write(body[at : at + 1])
                self.wfile.flush()
                if self.over.wait(0.2):
                    return

    def drop(self, body: bytes = b"") -> None:
        """The connection ends behind these bytes."""
        self.wfile.write(body)
        self.close_connection = True


@contextmanager
def serving(handler: type[Handler]) -> Iterator[str]:
    """The address of a server with such a handler, while the block runs."""
    over = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (handler,), {"over": over}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
