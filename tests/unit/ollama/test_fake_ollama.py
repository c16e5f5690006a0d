"""The fake Ollama server responds as Ollama's documentation shows."""

from __future__ import annotations

import hashlib
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_ollama import FakeOllama
from support.ollama_texts import format_parameters, go_json, go_value


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[FakeOllama]:
    server = FakeOllama(tmp_path / "ollama")
    yield server
    server.close()


def send(server: FakeOllama, method: str, path: str, body: Any = None) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(server.host, timeout=10)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data)
    response = connection.getresponse()
    return response.status, response.getheader("Content-Type") or "", response.read()


def test_texts_of_the_documentation() -> None:
    """From its page on `/api/show`."""
    assert list(format_parameters({"num_keep": 24})) == ["num_keep                       24"]
    stops = ["<|start_header_id|>", "<|eot_id|>"]
    assert list(format_parameters({"stop": stops})) == [
        'stop                           "<|start_header_id|>"',
        'stop                           "<|eot_id|>"',
    ]
    assert go_json({"a": "PARAMETER stop </s>"}) == b'{"a":"PARAMETER stop \\u003c/s\\u003e"}'
    assert [go_value(value) for value in (0.7, 40, True, 'a"\n', 1e-05)] == ["0.7", "40", "true", '"a\\"\\n"', "1e-05"]


def test_statuses_of_the_documentation(ollama: FakeOllama) -> None:
    assert send(ollama, "GET", "/api/version") == (200, "application/json; charset=utf-8", b'{"version":"0.33.0"}')
    assert send(ollama, "GET", "/api/tags")[2] == b'{"models":[]}'
    data = b"GGUF and more"
    digest, other = f"sha256:{hashlib.sha256(data).hexdigest()}", f"sha256:{'0' * 64}"
    assert send(ollama, "HEAD", f"/api/blobs/{digest}")[0] == 404
    status, _, body = send(ollama, "POST", f"/api/blobs/{other}", data)
    assert (status, json.loads(body)) == (400, {"error": f'digest mismatch, expected "{other}", got "{digest}"'})
    # As in Ollama, the blob is stored under its real digest.
    assert (
        send(ollama, "HEAD", f"/api/blobs/{digest}")[0] == 200 and send(ollama, "HEAD", f"/api/blobs/{other}")[0] == 404
    )
    assert send(ollama, "POST", f"/api/blobs/sha256:{hashlib.sha256(b'a').hexdigest()}", b"a") == (201, "", b"")
    for method, path in (("POST", "/api/show"), ("DELETE", "/api/delete")):
        status, _, body = send(ollama, method, path, {"model": "m"})
        assert (status, json.loads(body)) == (404, {"error": "model 'm' not found"})
    assert json.loads(send(ollama, "POST", "/api/create", {"model": "a b"})[2]) == {"error": "invalid model name"}
    assert send(ollama, "POST", "/api/create", b"")[0] == 400


def test_a_stream_of_statuses(ollama: FakeOllama, finished_gguf: tuple[Path, str]) -> None:
    path, sha256 = finished_gguf
    assert send(ollama, "POST", f"/api/blobs/sha256:{sha256}", path.read_bytes())[0] == 201
    request = {"model": "m", "files": {path.name: f"sha256:{sha256}"}, "system": "Be terse."}
    status, kind, body = send(ollama, "POST", "/api/create", request)
    lines = body.split(b"\n")
    assert (status, kind) == (200, "application/x-ndjson") and lines.pop() == b""
    assert lines[0] == b'{"status":"parsing GGUF"}' and lines[-1] == b'{"status":"success"}'
    digest = hashlib.sha256(b"Be terse.").hexdigest()
    assert f'{{"status":"creating new layer sha256:{digest}"}}'.encode() in lines
    assert ollama.blob(f"sha256:{digest}").read_bytes() == b"Be terse."
