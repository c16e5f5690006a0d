"""A server on this machine that misbehaves on purpose, as its handler decides: silent, slow, truncated, dropped."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Base of the tests' handlers, which define `do_GET`."""

    protocol_version = "HTTP/1.1"
    over: threading.Event

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def begin(self, code: int, length: int, **headers: str) -> None:
        """Send status and headers."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def hold(self) -> None:
        """Send nothing more until the server ends."""
        self.close_connection = True
        self.over.wait()

    def trickle(self, body: bytes) -> None:
        """Send a byte now and then, more often than a timeout for silence would notice."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            for index in range(len(body)):
                self.wfile.write(body[index : index + 1])
                self.wfile.flush()
                if self.over.wait(0.2):
                    return

    def drop(self, body: bytes = b"") -> None:
        """Close the connection after these bytes."""
        self.wfile.write(body)
        self.close_connection = True


@contextmanager
def serving(handler: type[Handler]) -> Iterator[str]:
    """Run a server with such a handler while the block runs; yield its address."""
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
