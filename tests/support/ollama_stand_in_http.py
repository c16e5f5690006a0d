"""The HTTP side of the stand-in for Ollama: routes, streams, blobs, and connections that end early."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from kolotune.ollama.go_json import go_json
from support.ollama_stand_in_prompts import Refused

if TYPE_CHECKING:
    from support.ollama_stand_in import OllamaStandIn

_CHUNK = 1 << 18


class _HangUp(Exception):
    """Ends the connection without a response."""


def handler_for(owner: OllamaStandIn) -> type[BaseHTTPRequestHandler]:
    """Return the class of handlers for a server."""

    class Handler(_Handler):
        server_of = owner

    return Handler


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 as Go's server speaks it: chunked streams, everything else with its length."""

    protocol_version = "HTTP/1.1"
    server_of: OllamaStandIn

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: requests are in `OllamaStandIn.requests`."""

    def do_HEAD(self) -> None:
        self._respond()

    do_GET = do_POST = do_DELETE = do_HEAD

    def _respond(self) -> None:
        owner = self.server_of
        if owner.fault == "silent":
            owner.released.wait(20)
            return
        if owner.fault == "no JSON":
            self._send(200, b"<html>It works!</html>", "text/html")
            return
        try:
            self._route(owner)
        except Refused as refused:
            self._json(refused.status, {"error": refused.error})
        except _HangUp:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _route(self, owner: OllamaStandIn) -> None:
        if self.path.startswith("/api/blobs/"):
            self._blob(owner, self.path.removeprefix("/api/blobs/"))
            return
        body = b"".join(self._body())
        owner.requests.append((self.command, self.path, len(body)))
        if self.command in ("GET", "HEAD"):
            if self.path not in ("/api/version", "/api/tags"):
                self._send(404, b"404 page not found", "text/plain")
                return
            self._json(200, {"version": owner.version} if self.path == "/api/version" else owner.tags())
            return
        if not body:
            raise Refused(400, "missing request body")
        request = json.loads(body)
        where = (self.command, self.path)
        if where == ("POST", "/api/show"):
            self._json(200, owner.show(request.get("model") or request.get("name") or ""))
        elif where == ("DELETE", "/api/delete"):
            owner.model_named(request.get("model") or request.get("name") or "")
            del owner.models[owner.full_name(request.get("model") or request.get("name"))]
            self._send(200, b"")
        elif where == ("POST", "/api/create"):
            if owner.fault == "silent create":
                owner.released.wait(20)
                raise _HangUp
            self._send_events(request, owner.create(request))
        elif where == ("POST", "/api/chat"):
            answer = owner.chat(request)
            if isinstance(answer, dict):  # one object, also where a stream was asked for
                self._json(200, answer)
            else:
                self._send_events(request, answer)
        elif where == ("POST", "/api/embed"):
            owner.model_named(request.get("model", ""))
            raise Refused(501, "This server does not support embeddings. Start it with `--embeddings`")
        else:
            self._send(404, b"404 page not found", "text/plain")

    def _blob(self, owner: OllamaStandIn, digest: str) -> None:
        path = owner.blob(digest)
        if self.command == "HEAD":
            owner.requests.append(("HEAD", self.path, 0))
            if not path.exists():
                raise Refused(404, f'blob "{digest}" not found')
            self._send(200, b"")
            return
        received, seen = 0, hashlib.sha256()
        partial = owner.folder / f"{threading.get_ident()}.partial"
        with partial.open("wb") as file:
            for piece in self._body():
                if owner.fault == "down in blob" and received:
                    raise _HangUp
                if owner.fault == "full disk" and received:
                    raise Refused(500, "write blob: no space left on device")
                if owner.fault == "damage in blob" and not received:
                    piece = bytes([piece[0] ^ 1]) + piece[1:]
                received += len(piece)
                seen.update(piece)
                file.write(piece)
        owner.requests.append(("POST", self.path, received))
        arrived = f"sha256:{seen.hexdigest()}"
        partial.replace(owner.blob(arrived))  # as Ollama does: it is stored under its real digest
        if arrived != digest:
            raise Refused(400, f'digest mismatch, expected "{digest}", got "{arrived}"')
        self._send(201, b"")

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, _CHUNK))
            if not piece:
                return
            left -= len(piece)
            yield piece

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, go_json(value).encode(), "application/json; charset=utf-8")

    def _send(self, status: int, body: bytes, kind: str = "") -> None:
        self.send_response(status)
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_events(self, request: dict[str, Any], events: Iterator[dict[str, Any]]) -> None:
        """Send the events as a stream, or the last one with the whole text, as the request asks for."""
        if request.get("stream", True):
            self._stream(events)
            return
        all_events = list(events)
        last = all_events[-1]
        if "error" in last:
            raise Refused(500, last["error"])
        if "message" in last:
            last["message"]["content"] = "".join(event["message"]["content"] for event in all_events)
        self._json(200, last)

    def _stream(self, events: Iterator[dict[str, Any]]) -> None:
        first = next(events, None)  # an error before the first line becomes a status
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while first is not None:
                line = go_json(first).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()
                if self.server_of.fault == "create cut":
                    self.wfile.write(b'20\r\n{"status":')
                    raise _HangUp
                first = next(events, None)
            self.wfile.write(b"0\r\n\r\n")
