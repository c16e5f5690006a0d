"""The client of Ollama: addresses, responses, faults."""

from __future__ import annotations

import hashlib
import os
import socket
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.ollama_stand_in import OllamaStandIn

from kolotune.foundation.errors import OllamaDownError, OllamaError
from kolotune.ollama.client import OllamaClient
from kolotune.ollama.compatibility import release_numbers
from kolotune.ollama.confirmation import Difference, SentModel, find_differences
from kolotune.ollama.modelfile import ModelDescription
from kolotune.ollama.modelfile_parser import parse_description
from kolotune.ollama.parameters import as_options
from kolotune.weights.gguf_metadata import read_metadata


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[OllamaStandIn]:
    server = OllamaStandIn(tmp_path / "ollama")
    yield server
    server.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    "spelling", ["127.0.0.1:{port}", "http://127.0.0.1:{port}", "http://localhost:{port}/", ":{port}", "0.0.0.0:{port}"]
)
def test_addresses(spelling: str, ollama: OllamaStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", spelling.format(port=ollama.host.partition(":")[2]))
    server = OllamaClient()
    assert server.version() == "0.33.0"
    assert server.url.startswith("http://") and "0.0.0.0" not in server.url


def test_the_default_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    assert OllamaClient().url == "http://127.0.0.1:11434"
    assert OllamaClient("https://example.com/ollama").url == "https://example.com/ollama"


@pytest.mark.parametrize("spelling", ["127.0.0.1:port", "http://[::1", "127.0.0.1:99999"])
def test_invalid_addresses(spelling: str) -> None:
    with pytest.raises(OllamaError) as error:
        OllamaClient(spelling).version()
    assert "OLLAMA_HOST" in error.value.hint


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_proxies_are_not_used_for_this_machine(
    variable: str, ollama: OllamaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    assert OllamaClient(ollama.host).version() == "0.33.0"
    with pytest.raises(OllamaError):  # for another machine the proxy is used
        OllamaClient("http://192.0.2.1:11434", patience=5).version()


def test_no_server() -> None:
    with pytest.raises(OllamaDownError) as error:
        OllamaClient(f"127.0.0.1:{free_port()}").version()
    assert error.value.exit_code == 25 and "ollama serve" in error.value.hint and "OLLAMA_HOST" in error.value.hint
    with pytest.raises(OllamaDownError):
        list(OllamaClient(f"127.0.0.1:{free_port()}").chat("m", [{"role": "user", "content": "a"}], {}))


@pytest.mark.parametrize("fault", ["silent", "no JSON"])
def test_something_else_listens(fault: str, ollama: OllamaStandIn) -> None:
    ollama.fault = fault
    server = OllamaClient(ollama.host, patience=0.5)
    with pytest.raises(OllamaError) as error:
        server.version()
    assert not isinstance(error.value, OllamaDownError) and server.url in error.value.cause
    with pytest.raises(OllamaError):
        server.show("m")
    with pytest.raises(OllamaError):
        list(server.create("m", ModelDescription("./x"), {"x": "0" * 64}))


def test_a_large_file_is_never_in_memory(tmp_path: Path, ollama: OllamaStandIn) -> None:
    path, size = tmp_path / "large.gguf", 64 << 20
    with path.open("wb") as file:
        file.truncate(size)
    sha256 = hashlib.sha256(bytes(size)).hexdigest()
    server, reported = OllamaClient(ollama.host), []
    assert not server.has_blob(sha256)
    tracemalloc.start()
    server.send_blob(path, sha256, reported.append)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
    assert reported[-1] == size and reported == sorted(reported) and len(reported) > 10
    assert server.has_blob(sha256)
    assert ollama.blob(f"sha256:{sha256}").stat().st_size == size


@pytest.mark.parametrize(
    ("fault", "words"), [("down in blob", "connection"), ("damage in blob", "digest mismatch"), ("full disk", "")]
)
def test_a_blob_that_does_not_arrive(fault: str, words: str, tmp_path: Path, ollama: OllamaStandIn) -> None:
    path = tmp_path / "some.gguf"
    path.write_bytes(os.urandom(4 << 20))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    ollama.fault = fault
    server = OllamaClient(ollama.host)
    with pytest.raises(OllamaError) as error:
        server.send_blob(path, sha256, lambda sent: None)
    assert words in error.value.cause and "some.gguf" in error.value.cause
    assert not server.has_blob(sha256)
    ollama.fault = ""
    server.send_blob(path, sha256, lambda sent: None)
    assert server.has_blob(sha256)


def test_an_invalid_hash(ollama: OllamaStandIn) -> None:
    with pytest.raises(OllamaError):
        OllamaClient(ollama.host).has_blob("no hash")


def test_an_unknown_model(ollama: OllamaStandIn) -> None:
    server = OllamaClient(ollama.host)
    assert server.show("nothing") is None and server.digest("nothing") == "" and not server.delete("nothing")
    with pytest.raises(OllamaError) as error:
        list(server.chat("nothing", [{"role": "user", "content": "a"}], {}))
    assert "'nothing' not found (404)" in error.value.cause
    with pytest.raises(OllamaError, match="blob not found"):
        list(server.create("m", ModelDescription("./x"), {"x": "0" * 64}))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0.17.1", (0, 17, 1)), ("v0.30.0-rc1", (0, 30, 0)), ("0.0.0", ()), ("", ()), ("main", ()), ("1.2", ())],
)
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert release_numbers(text) == numbers
    assert not numbers or numbers < (1, 0, 0)


# ---------------------------------------------------------------- confirming a model

SENT = ModelDescription(
    "./x.gguf",
    template='{{ "a\\x22" }}\n{{ .Prompt }}',
    system='He said """no""".\n\u2028\u200d\x1b end',
    parameters=(
        ("stop", '<|"\\\n\u200d🙂|>'),
        ("temperature", 0.1),
        ("stop", "b  c"),
        ("num_ctx", 4096),
        ("use_mmap", True),
    ),
    licenses=("one", "two\nthree"),
    messages=(("user", "hello: you"), ("assistant", "yes")),
)


def test_a_model_is_shown_as_it_was_sent(ollama: OllamaStandIn, finished_gguf: tuple[Path, str]) -> None:
    path, sha256 = finished_gguf
    server = OllamaClient(ollama.host)
    server.send_blob(path, sha256, lambda sent: None)
    statuses = list(server.create("m", SENT, {path.name: sha256}))
    assert statuses[0] == "parsing GGUF" and statuses[-1] == "writing manifest"
    shown = server.show("M")
    assert shown is not None
    sent = SentModel(SENT, sha256, read_metadata(path))
    assert find_differences(shown, sent) == []
    assert find_differences(shown, replace(sent, sha256="0" * 64)) == [Difference("weights", sha256[:12], "0" * 12)]
    assert len(server.digest("m")) == 64
    changes = {
        "template": {"template": "x"},
        "system": {"system": None},
        "license": {"licenses": ("one",)},
        "messages": {"messages": ()},
        "stop": {"parameters": SENT.parameters[1:]},
        "use_mmap": {"parameters": SENT.parameters[:-1]},
        "seed": {"parameters": (*SENT.parameters, ("seed", 1))},
    }
    for name, change in changes.items():
        (only,) = find_differences(shown, replace(sent, description=replace(SENT, **change)))
        assert only.part == name


def test_options() -> None:
    options = as_options(SENT.parameters)
    assert options["stop"] == ['<|"\\\n\u200d🙂|>', "b  c"] and options["num_ctx"] == 4096
    text = 'FROM ./x\nLICENSE a\nLICENSE """b\nc"""\nMESSAGE user hi: there\nMESSAGE assistant ho\nPARAMETER top_k 3\n'
    found = parse_description(text)
    assert found.licenses == ("a", "b\nc") and found.messages == (("user", "hi: there"), ("assistant", "ho"))
    assert as_options(found.parameters) == {"top_k": 3}
