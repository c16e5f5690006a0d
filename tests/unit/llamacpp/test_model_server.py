"""llama.cpp's server with a model: what it answers, refuses and survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.waiting import wait_until

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError, ConfigError, ToolchainError
from kolotune.llamacpp.model_server import ModelServer, ServerSettings, _lines
from kolotune.run_folder.layout import RunFolder

HELLO = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def gguf(finished: Config) -> Path:
    return RunFolder(finished.output_dir).gguf


@pytest.fixture(scope="module")
def server(gguf: Path) -> Iterator[ModelServer]:
    with ModelServer(gguf, ServerSettings("tiny", context=300)) as server:
        yield server


def test_tokens_and_prompts(server: ModelServer) -> None:
    assert server.context == 300 and not server.takes_tools
    prompt = server.prompt({"messages": [HELLO]})
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    ids = server.tokens("<|im_end|>Hello")
    assert len(ids) == 2 and server.post("/detokenize", {"tokens": ids})["content"] == "<|im_end|>Hello"
    assert "<|im_end|>" in server.end_texts


def test_special_tokens_are_shown_and_can_be_stops(server: ModelServer) -> None:
    (start,) = server.tokens("<|im_start|>")
    request = {"prompt": "Hello", "n_predict": 3, "logit_bias": [[start, 100]], "temperature": 0}
    assert server.post("/completion", request)["content"] == "<|im_start|>" * 3
    stopped = server.post("/completion", {**request, "stop": ["<|im_start|>"]})
    assert stopped["content"] == "" and stopped["stop_type"] == "word"


def test_streams_and_refusals(server: ModelServer) -> None:
    events = list(server.events("/completion", {"prompt": "Hello", "n_predict": 3, "ignore_eos": True}))
    assert events[-1]["stop"] is True and events[-1]["tokens_predicted"] == 3
    left = server.events("/completion", {"prompt": "Hello", "n_predict": 200, "ignore_eos": True})
    next(left)
    left.close()
    for ask in (server.post, lambda *asked: list(server.events(*asked))):
        with pytest.raises(ConfigError, match=r"refuses the request: .*messages"):
            ask("/v1/chat/completions", {"messages": "Hello"})
        with pytest.raises(ConfigError, match=r"longer than the model's context: 6.. tokens of 300"):
            ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 600}]})


def test_only_a_line_feed_ends_a_line() -> None:
    assert list(_lines([b"data: a\xe2\x80\xa8", b"b\r\n", b"\ndata:", b" c\n", b"rest"])) == [
        "data: a\u2028b\r".encode(),
        b"",
        b"data: c",
    ]


def test_only_this_process_can_ask(server: ModelServer) -> None:
    for path in ("/v1/chat/completions", "/completion", "/tokenize"):
        assert httpx.post(server.address + path, json={}, trust_env=False).status_code == 401


def test_a_crash_is_an_error(gguf: Path) -> None:
    with ModelServer(gguf) as server:
        assert server.end() == ""
        events = server.events("/completion", {"prompt": "Hello", "n_predict": 1000, "ignore_eos": True})
        next(events)
        os.kill(server.process_id, signal.SIGKILL)
        with pytest.raises(ToolchainError, match=r"ended while it computed \(signal 9\)"):
            list(events)
        with pytest.raises(ToolchainError):
            server.tokens("Hello")
        assert server.end() == "signal 9"


def test_files_that_are_no_model(gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:-100_000])
    with pytest.raises(ArtifactError, match=r"cut\.gguf: llama.cpp can't load it: .*not within the file bounds"):
        ModelServer(cut)
    cut.write_bytes(b"no GGUF")
    with pytest.raises(ArtifactError, match="not a whole GGUF"):
        ModelServer(cut)


@pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL")
def test_it_ends_with_its_parent(gguf: Path) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from kolotune.llamacpp.model_server import ModelServer
        server = ModelServer(Path(sys.argv[1]))
        print(server.address, flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(gguf)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        address = parent.stdout.readline().strip()
        assert httpx.get(f"{address}/health", trust_env=False).status_code == 200
        parent.send_signal(signal.SIGKILL)

    def is_gone() -> bool:
        try:
            httpx.get(f"{address}/health", trust_env=False, timeout=1)
        except httpx.HTTPError:
            return True
        return False

    wait_until(is_gone, "the server to end")
