"""A server that keeps to Ollama's documented API, with faults on demand.

Not Ollama: written from its documentation and the behaviour of its source (v0.33). It uses what it is sent: blobs lie
on disk, the template is rendered by Go's text/template, and llama.cpp answers from the stored GGUF. What only a real
one can tell: which template it takes where it was given none, how it cuts a conversation that is too long, and
whether a version does any of this otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kolotune.foundation.quantization_types import FILE_TYPES
from kolotune.gguf import header
from kolotune.gguf.inference import GgufModel, Sampling
from support.go_templates import Renderer, job
from support.ollama_texts import go_json, lines_of, modelfile_of

_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(rf"(?:(?:[A-Za-z0-9_][A-Za-z0-9_.:-]*/)?[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}}/)?{_PART}(?::{_PART})?")
_OPTIONS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.0, "num_predict": -1}
_CHUNK = 1 << 18

FAULTS = {
    "down in blob": "the connection ends in the middle of a blob",
    "damage in blob": "a byte of the blob is another when it arrives",
    "full disk": "500 while a blob comes",
    "error in create": "an error as a line of a stream that began with 200",
    "create refused": "400 at once",
    "create breaks off": "the stream ends before success",
    "create cut": "the connection ends within a line",
    "silent create": "no answer within anyone's patience",
    "another template": "show has a template that was not sent",
    "another stop": "show lacks a stop",
    "other weights": "show names another blob",
    "forgets": "show knows nothing of what was made",
    "error in chat": "an error as a line of a stream that began with 200",
    "chat breaks off": "the stream ends before done",
    "no JSON": "a web page instead of an answer",
    "silent": "no answer to anything",
}


class Refused(Exception):
    """Ends a request with a status and Ollama's kind of error."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status, self.error = status, error


@dataclass
class FakeOllama:
    """One server on a free port of this machine, with its models below a folder.

    Attributes:
        folder: where blobs and models are.
        renderer: of Go templates; None: chats are refused.
        version: what it says it is.
        fault: a key of `FAULTS`, or "".
        asked: (method, path, bytes of the body) of every request.
    """

    folder: Path
    renderer: Renderer | None = None
    version: str = "0.33.0"
    fault: str = ""
    asked: list[tuple[str, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
        self.models: dict[str, dict[str, Any]] = {}
        self.prompts: list[str] = []
        self.released = threading.Event()
        self._loaded: dict[tuple[Path, int], GgufModel] = {}
        self._busy = threading.Lock()
        owner = self

        class Handler(_Handler):
            server_of = owner

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.host = f"127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        while self._loaded:  # now, and not when the collector comes: llama.cpp speaks to standard error
            self._loaded.popitem()[1]._model.close()

    def counted(self, method: str, beginning: str) -> int:
        """How many requests there were of a method whose path begins so."""
        return sum(1 for verb, path, _ in self.asked if verb == method and path.startswith(beginning))

    # ------------------------------------------------------------ what it keeps

    def blob(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise Refused(400, "invalid digest format")
        return self.folder / "blobs" / digest.replace(":", "-")

    def existing(self, name: str) -> str:
        """The full name, in the case of a model that is there; names differ by more than case."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise Refused(400, "invalid model name")
        full = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
        return next((each for each in self.models if each.lower() == full.lower()), full)

    def found(self, name: str) -> dict[str, Any]:
        full = self.existing(name)
        if full not in self.models:
            raise Refused(404, f"model '{name}' not found")
        return self.models[full]

    def layer(self, text: str) -> str:
        """Keeps a text as a blob; the status line of it."""
        data = text.encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        new = not self.blob(digest).exists()
        self.blob(digest).write_bytes(data)
        return f"{'creating new' if new else 'using existing'} layer {digest}"

    # ------------------------------------------------------------ what it answers

    def create(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        full, digest = self._to_create(request)
        yield {"status": "parsing GGUF"}
        if self.fault == "error in create":
            yield {"error": "this GGUF is of no use"}
            return
        header.read(self.blob(digest))
        yield {"status": f"using existing layer {digest}"}
        texts = {name: request.get(name) for name in ("template", "system") if request.get(name)}
        license_ = request.get("license") or []
        texts |= {
            f"license {at}": each for at, each in enumerate([license_] if isinstance(license_, str) else license_)
        }
        if request.get("parameters"):
            texts["parameters"] = json.dumps(request["parameters"])
        if request.get("messages"):
            texts["messages"] = json.dumps(request["messages"])
        for text in texts.values():
            yield {"status": self.layer(text)}
        if self.fault == "create breaks off":
            return
        yield {"status": "writing manifest"}
        if self.fault != "forgets":
            self.models[full] = {
                "name": full,
                "digest": digest,
                "template": request.get("template") or "",
                "system": request.get("system") or "",
                "licenses": [text for name, text in texts.items() if name.startswith("license ")],
                "parameters": request.get("parameters") or {},
                "messages": request.get("messages") or [],
                "modified": _now(),
            }
        yield {"status": "success"}

    def _to_create(self, request: dict[str, Any]) -> tuple[str, str]:
        """The full name and the weights' digest, if the request can be met at all."""
        full, files = self.existing(request.get("model") or request.get("name") or ""), request.get("files")
        if "typical_p" in (request.get("parameters") or {}):
            raise Refused(400, "typical_p is deprecated and cannot be set as a model parameter")
        if request.get("adapters"):
            raise Refused(400, "LoRA adapters are no longer supported")
        if self.fault == "create refused":
            raise Refused(400, "no place for that")
        if not files:
            raise Refused(400, "neither 'from' or 'files' was specified")
        ((file, digest),) = files.items()
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise Refused(400, f"file path must be relative: {file}")
        if not self.blob(digest).exists():
            raise Refused(400, f"blob not found for {file} (digest {digest})")
        return full, digest

    def show(self, name: str) -> dict[str, Any]:
        model = dict(self.found(name))
        if self.fault == "another template":
            model["template"] = "{{ .Prompt }}"
        if self.fault == "another stop":
            model["parameters"] = model["parameters"] | {"stop": model["parameters"]["stop"][1:]}
        if self.fault == "other weights":
            model["digest"] = f"sha256:{'0' * 64}"
        path = self.blob(model["digest"])
        summary = header.read(self.blob(self.found(name)["digest"]))
        kinds = {number: kind for kind, number in FILE_TYPES.items()} | {0: "F32", 1: "F16"}
        answer = {
            "license": "\n".join(model["licenses"]),
            "modelfile": modelfile_of(model, path),
            "parameters": "\n".join(lines_of(model["parameters"])),
            "template": model["template"] or "{{ .Prompt }}",
            "system": model["system"],
            "details": {
                "parent_model": "",
                "format": "gguf",
                "family": summary.architecture,
                "families": [summary.architecture],
                "parameter_size": f"{sum(math.prod(tensor.shape) for tensor in summary.tensors.values()) / 1e6:.2f}M",
                "quantization_level": kinds.get(summary.fields.get("general.file_type", -1), "unknown"),
            },
            "messages": model["messages"],
            "model_info": {key: value for key, value in summary.fields.items() if isinstance(value, (int, float, str))},
            "capabilities": ["completion"],
            "modified_at": model["modified"],
        }
        return {key: value for key, value in answer.items() if value not in ("", [])}

    def tags(self) -> dict[str, Any]:
        return {
            "models": [
                {
                    "name": name,
                    "model": name,
                    "modified_at": model["modified"],
                    "size": self.blob(model["digest"]).stat().st_size,
                    "digest": hashlib.sha256(json.dumps(model).encode()).hexdigest(),
                    "details": {"format": "gguf"},
                }
                for name, model in self.models.items()
            ]
        }

    def chat(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        model, turns = self.found(request.get("model", "")), list(request.get("messages") or [])
        began, name = time.monotonic_ns(), request["model"]
        options = {**_OPTIONS, **model["parameters"], **(request.get("options") or {})}
        if self.renderer is None or not model["template"]:
            raise Refused(500, "this one renders no template")
        all_turns = [*model["messages"], *turns]
        if turns[0]["role"] != "system" and model["system"]:
            all_turns.insert(0, {"role": "system", "content": model["system"]})
        prompt = self.renderer([job(model["template"], [all_turns])])[0][0]
        self.prompts.append(prompt)
        with self._busy:
            context = int(options.get("num_ctx", 4096))
            key = (self.blob(model["digest"]), context)
            if key not in self._loaded:
                self._loaded[key] = GgufModel(key[0], context=context)
            loaded = self._loaded[key]
            # Ollama lets the GGUF decide whether a BOS is put before the prompt.
            ids = loaded._model.tokenize(prompt.encode(), add_bos=True, special=True)
            limit = int(options["num_predict"])
            answer = loaded.generate(
                ids,
                options.get("stop", []),
                temperature=float(options["temperature"]),
                max_tokens=limit if limit > 0 else context - len(ids),
                seed=int(options.get("seed", 0)),
                sampling=Sampling(
                    int(options["top_k"]), float(options["top_p"]), float(options["min_p"]),
                    repeat_penalty=float(options["repeat_penalty"]),
                ),
            )  # fmt: skip
            for number, piece in enumerate(answer):
                if self.fault and number == 2:
                    if self.fault == "error in chat":
                        yield {"error": "the model fell over"}
                    return
                said = {"role": "assistant", "content": piece}
                yield {"model": name, "created_at": _now(), "message": said, "done": False}
        yield {
            "model": name,
            "created_at": _now(),
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": answer.reason,
            "total_duration": time.monotonic_ns() - began,
            "load_duration": 1,
            "prompt_eval_count": len(ids),
            "prompt_eval_duration": 1,
            "eval_count": answer.tokens,
            "eval_duration": 1,
        }


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 as Go's server speaks it: streams in chunks, everything else with its length."""

    protocol_version = "HTTP/1.1"
    server_of: FakeOllama

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: the requests are noted in `asked`."""

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_DELETE = do_HEAD

    def _answer(self) -> None:
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

    def _route(self, owner: FakeOllama) -> None:
        if self.path.startswith("/api/blobs/"):
            self._blob(owner, self.path.removeprefix("/api/blobs/"))
            return
        body = b"".join(self._body())
        owner.asked.append((self.command, self.path, len(body)))
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
            owner.found(request.get("model") or request.get("name") or "")
            del owner.models[owner.existing(request.get("model") or request.get("name"))]
            self._send(200, b"")
        elif where == ("POST", "/api/create"):
            if owner.fault == "silent create":
                owner.released.wait(20)
                raise _HangUp
            self._tell(request, owner.create(request))
        elif where == ("POST", "/api/chat"):
            self._tell(request, owner.chat(request))
        else:
            self._send(404, b"404 page not found", "text/plain")

    def _blob(self, owner: FakeOllama, digest: str) -> None:
        path = owner.blob(digest)
        if self.command == "HEAD":
            owner.asked.append(("HEAD", self.path, 0))
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
        owner.asked.append(("POST", self.path, received))
        arrived = f"sha256:{seen.hexdigest()}"
        partial.replace(owner.blob(arrived))  # as Ollama does: it is kept under the name that it has earned
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
        self._send(status, go_json(value), "application/json; charset=utf-8")

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

    def _tell(self, request: dict[str, Any], events: Iterator[dict[str, Any]]) -> None:
        """The events as they come, or the last one with all that was said, as the request wants."""
        if request.get("stream", True):
            self._stream(events)
            return
        all_events = list(events)
        last = all_events[-1]
        if "error" in last:
            raise Refused(500, last["error"])
        if "message" in last:
            last["message"]["content"] = "".join(each["message"]["content"] for each in all_events)
        self._json(200, last)

    def _stream(self, events: Iterator[dict[str, Any]]) -> None:
        first = next(events, None)  # an error before the first line is a status of its own
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while first is not None:
                line = go_json(first) + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()
                if self.server_of.fault == "create cut":
                    self.wfile.write(b'20\r\n{"status":')
                    raise _HangUp
                first = next(events, None)
            self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def fake_ollama(tmp_path: Path, go: Renderer) -> Iterator[FakeOllama]:
    """A server of this module, faults and all."""
    server = FakeOllama(tmp_path / "ollama", go)
    yield server
    server.close()


@pytest.fixture
def any_ollama(request: pytest.FixtureRequest) -> str:
    """Where an Ollama server listens: a real one that OLLAMA_HOST names, else one of this module."""
    real = os.environ.get("OLLAMA_HOST")
    return real if real else str(request.getfixturevalue("fake_ollama").host)


only_real = pytest.mark.skipif(not os.environ.get("OLLAMA_HOST"), reason="only a real Ollama can tell: set OLLAMA_HOST")


class _HangUp(Exception):
    """Ends the connection without a word."""


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
