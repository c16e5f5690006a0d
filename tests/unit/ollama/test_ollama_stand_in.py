"""The stand-in for Ollama responds as the documentation shows, and as a real server was seen to."""

from __future__ import annotations

import hashlib
import http.client
import json
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from support.observed import CHATS, DATE, GGUF_TEMPLATES, OBSERVED
from support.ollama_stand_in import OllamaStandIn
from support.ollama_texts import format_parameters, go_value
from support.small_tokenizer import CHATML, small_gguf

from kolotune.weights.gguf_metadata import read_metadata


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[OllamaStandIn]:
    server = OllamaStandIn(tmp_path / "ollama")
    yield server
    server.close()


def send(server: OllamaStandIn, method: str, path: str, body: Any = None) -> tuple[int, str, bytes]:
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
    assert [go_value(value) for value in (0.7, 40, True, 'a"\n', 1e-05)] == ["0.7", "40", "true", '"a\\"\\n"', "1e-05"]


def test_statuses_of_the_documentation(ollama: OllamaStandIn) -> None:
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


def test_a_stream_of_statuses(ollama: OllamaStandIn, finished_gguf: tuple[Path, str]) -> None:
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


# ---------------------------------------------------------------- what a real server was seen to do


@pytest.fixture
def create(ollama_stand_in: OllamaStandIn, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that creates a model, and returns the statuses: ``create("name", jinja="…", template=…)``."""

    def make(name: str, jinja: str = CHATML, architecture: str = "llama", **fields: Any) -> list[dict[str, Any]]:
        data = small_gguf(tmp_path / "small.gguf", jinja, architecture=architecture, weights=True)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert send(ollama_stand_in, "POST", f"/api/blobs/{digest}", data)[0] == 201
        request = {"model": name, "files": {"small.gguf": digest}, **fields}
        status, _, body = send(ollama_stand_in, "POST", "/api/create", request)
        assert status == 200
        return [json.loads(line) for line in body.splitlines()]

    return make


def show(server: OllamaStandIn, name: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(send(server, "POST", "/api/show", {"model": name})[2])
    return answer


def ask(server: OllamaStandIn, name: str, chat: dict[str, Any], **more: Any) -> tuple[int, dict[str, Any]]:
    status, _, body = send(server, "POST", "/api/chat", {"model": name, "stream": False, **chat, **more})
    return status, json.loads(body)


@pytest.mark.parametrize("gguf", GGUF_TEMPLATES)
def test_observed_models(gguf: str, ollama_stand_in: OllamaStandIn, create: Callable[..., Any]) -> None:
    for model in OBSERVED:
        if model.gguf_name != gguf:
            continue
        create("obs", model.jinja, template=model.template)
        shown = show(ollama_stand_in, "obs")
        assert shown["template"] == model.shown_template
        assert tuple(shown["capabilities"]) == model.capabilities
        stops = [line.split(None, 1)[1].strip('"') for line in shown.get("parameters", "").splitlines()]
        assert tuple(stops) == model.stops
        for name, expected in model.prompts.items():
            status, answer = ask(ollama_stand_in, "obs", CHATS[name], _debug_render_only=True)
            if isinstance(expected, dict):
                assert status == expected["status"] and _reason(answer["error"]) in expected["error"]
                continue
            prompt = answer["_debug_info"]["rendered_template"]
            assert prompt.replace(date.today().strftime("%d %b %Y"), DATE) == expected, name


def _reason(error: str) -> str:
    """The part of a refusal that the data has in full: long ones were cut."""
    return "Unable to generate parser for this template" if "Unable" in error else error.replace('"', '\\"')


QUESTION = {"messages": [{"role": "user", "content": "hi"}]}


def test_weights_go_through_llama_cpps_writer(
    ollama_stand_in: OllamaStandIn, create: Callable[..., Any], tmp_path: Path
) -> None:
    create("m")
    sent = f"sha256-{hashlib.sha256((tmp_path / 'small.gguf').read_bytes()).hexdigest()}"
    stored = ollama_stand_in.models["m:latest"].digest
    assert stored.replace(":", "-") in show(ollama_stand_in, "m")["modelfile"] and stored[7:] != sent[7:]
    fields = list(read_metadata(ollama_stand_in.blob(stored)))
    assert fields[-2:] == ["general.quantization_version", "general.file_type"]
    assert ollama_stand_in._stored_weights(stored) == stored, "what went through it once stays"
    ollama_stand_in.version = "0.24.0"
    create("m")
    assert ollama_stand_in.models["m:latest"].digest.replace(":", "-") == sent


def test_special_requests(ollama_stand_in: OllamaStandIn, create: Callable[..., Any]) -> None:
    create("m", CHATML + "{# tools #}")
    assert ask(ollama_stand_in, "m", {"messages": []})[1]["done_reason"] == "load"
    status, answer = ask(ollama_stand_in, "m", QUESTION, options={"num_predict": 1})
    assert status == 200 and answer["prompt_eval_count"] == len("xuser\nhix\nxassistant\n")
    call = {"function": {"name": "f", "arguments": "{}"}}
    turns = [*QUESTION["messages"], {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert ask(ollama_stand_in, "m", {"messages": turns})[0] == 400
    assert send(ollama_stand_in, "POST", "/api/embed", {"model": "m", "input": "a"})[0] == 501


def test_what_is_too_long(ollama_stand_in: OllamaStandIn, create: Callable[..., Any]) -> None:
    turns = [{"role": "system", "content": "S"}]
    turns += [{"role": role, "content": str(number) * 20} for number in range(9) for role in ("user", "assistant")]
    turns += QUESTION["messages"]
    for name, template in (("jinja", None), ("go", "{{ range .Messages }}{{ .Role }} {{ .Content }}\n{{ end }}")):
        create(name, CHATML + "{# tools #}" * (template is None), template=template, parameters={"num_ctx": 256})
        status, answer = ask(ollama_stand_in, name, {"messages": turns}, _debug_render_only=True)
        prompt = answer["_debug_info"]["rendered_template"]
        assert status == 200 and "system" in prompt and "0000" not in prompt and "8888" in prompt
        long = {"messages": [{"role": "user", "content": "a" * 300}]}
        status, answer = ask(ollama_stand_in, name, long)
        assert status == (400 if template is None else 200) and answer.get("message", {}).get("content", "") == ""


@pytest.mark.parametrize(("architecture", "name"), [("gemma4", "gemma4"), ("nemotron_h", "nemotron-3-nano")])
def test_architectures_that_ollama_renders(
    architecture: str, name: str, ollama_stand_in: OllamaStandIn, create: Callable[..., Any]
) -> None:
    ollama_stand_in._stored_weights = lambda digest: digest  # type: ignore[method-assign]  # llama.cpp could not read it
    create("m", architecture=architecture)
    shown = show(ollama_stand_in, "m")
    assert (shown["renderer"], shown["parser"]) == (name, name)
    assert set(shown["capabilities"]) == {"completion", "tools", "thinking"}
    assert ("<turn|>" in shown.get("parameters", "")) == (architecture == "gemma4")


def test_templates_in_other_versions(ollama_stand_in: OllamaStandIn, create: Callable[..., Any]) -> None:
    template = "{{ range .Messages }}{{ .Content }}{{ end }}"
    create("m", CHATML + "{# tools #}", template=template)
    assert show(ollama_stand_in, "m")["template"].startswith("{%")
    ollama_stand_in.fault = "template forced"
    assert show(ollama_stand_in, "m")["template"] == template
    ollama_stand_in.fault, ollama_stand_in.version = "", "0.24.0"
    assert show(ollama_stand_in, "m")["template"] == template
    assert ask(ollama_stand_in, "m", QUESTION, _debug_render_only=True)[1]["_debug_info"]["rendered_template"] == "hi"
    ollama_stand_in.version = "0.11.9"
    assert "_debug_info" not in ask(ollama_stand_in, "m", QUESTION, _debug_render_only=True, options={"num_predict": 1})
