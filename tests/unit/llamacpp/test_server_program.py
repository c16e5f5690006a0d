"""A user's own llama-server: how it is started, and how both ends of the connection see each other's end."""

from __future__ import annotations

import csv
import os
import signal
import sys
import textwrap
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.waiting import wait_until

from kolotune.foundation import shared_libraries
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError, KolotuneError, ToolchainError
from kolotune.llamacpp import server_program
from kolotune.llamacpp.child_server import ChildServer
from kolotune.llamacpp.model_server import _PROCESS, ModelServer, ServerSettings, _explained
from kolotune.run_folder.layout import RunFolder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script")
# What it was started with is its answer to every question.
STAND_IN = """
import http.server, json, os, sys, threading

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        environment = {name: value for name, value in os.environ.items() if name.startswith("LLAMA_")}
        self.wfile.write(json.dumps([os.getpid(), sys.argv[1:], environment]).encode())

    def log_message(self, *_):
        pass

if "missing.gguf" in sys.argv:
    print("0.00.001.000 E llama_model_load: no such file", file=sys.stderr)
    sys.exit(3)
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("0.00.001.000 I loading", file=sys.stderr)
print(f"0.00.002.000 I srv  listening on http://127.0.0.1:{server.server_port}", file=sys.stderr, flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()
"""


REAL = server_program.find()


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "build" / "bin" / "llama-server"
    file.parent.mkdir(parents=True)
    file.write_text(f"#!{sys.executable}\n{textwrap.dedent(STAND_IN)}", encoding="utf-8")
    file.chmod(0o755)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    return file


def started(path: str = "a.gguf", **settings: Any) -> ChildServer:
    def explain(said: str) -> KolotuneError:
        return _explained(Path(path), said)

    task = {**asdict(ServerSettings(**settings)), "path": path}
    return ChildServer(_PROCESS, task, seconds=60, explain=explain)


def asked(server: ChildServer) -> tuple[int, list[str], dict[str, str]]:
    process, arguments, environment = httpx.get(server.address, trust_env=False).json()
    return process, arguments, environment


def test_the_settings_are_options_and_the_key_is_not() -> None:
    server = started(name="my run", context=300, parallel=3, threads=2, batch=64, gpu_layers=0, embeds=True)
    _, arguments, environment = asked(server)
    server.close()
    assert environment["LLAMA_API_KEY"] == server.key and server.key not in arguments
    given = dict(pairwise(arguments))
    for option, value in {
        "--model": "a.gguf", "--alias": "my run", "--host": "127.0.0.1", "--ctx-size": "900", "--pooling": "mean",
        "--kv-unified-per-slot": "300", "--parallel": "3", "--threads": "2", "--ubatch-size": "64", "--gpu-layers": "0",
        "--cache-ram": "1024",
    }.items():  # fmt: skip
        assert given[option] == value, option
    assert {"--embeddings", "--kv-unified", "--cache-idle-slots", "--no-ui", "--no-slots"} < set(arguments)
    assert "--lora" not in given and "--chat-template" not in given


def test_adapters_and_a_template() -> None:
    paths = ("a,b.gguf", 'c"d.gguf')
    server = started(parallel=2, template="{{ x }}", adapters=paths)
    _, arguments, _ = asked(server)
    server.close()
    given = dict(pairwise(arguments))
    assert given["--chat-template"] == "{{ x }}" and given["--cache-ram"] == "0"
    assert given["--lora"] == server_program.listed(paths) and next(csv.reader([given["--lora"]])) == list(paths)
    assert {"--lora-init-without-apply", "--no-cache-idle-slots"} < set(arguments)


def test_its_end_is_seen() -> None:
    server = started()
    os.kill(asked(server)[0], signal.SIGTERM)
    assert server.exit_code(20) == -signal.SIGTERM
    server.close()


@pytest.mark.parametrize("is_killed", [False, True])
def test_it_ends_with_the_process_that_started_it(is_killed: bool) -> None:
    server = started()
    process = psutil.Process(asked(server)[0])
    if is_killed:
        server.kill()
    else:
        server.close()
    wait_until(lambda: not process.is_running(), "the program to end")
    server.close()


def test_options_of_users_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_HF_REPO", "a/b")
    server = started()
    _, _, environment = asked(server)
    server.close()
    assert set(environment) == {"LLAMA_API_KEY", "LLAMA_CPP_DIR", "LLAMA_SERVER_ROUTER_PORT"}


def test_a_model_that_it_can_not_load() -> None:
    with pytest.raises(ArtifactError, match="can't load it: llama_model_load: no such file"):
        started("missing.gguf")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (f"#!{sys.executable}\nimport sys; sys.exit(5)", "ended with exit code 5"),
        ("#!/bin/sh\necho error: invalid argument: --fit >&2\necho usage >&2\nexit 1", "invalid argument: --fit"),
        ("#!/bin/sh\necho cannot open shared object >&2\nkill -ILL $$", "exit code -4: cannot open shared object"),
        ("#!/no/such/program\n", "can't be started"),
    ],
)
def test_a_program_that_does_not_fit(script: str, problem: str, program: Path) -> None:
    program.write_text(script, encoding="utf-8")
    with pytest.raises(ToolchainError, match=problem) as raised:
        started()
    assert shared_libraries.BUILD in raised.value.hint and "LLAMA_CPP_DIR" in raised.value.hint


@pytest.mark.skipif(REAL is None, reason="LLAMA_CPP_DIR names no llama-server")
def test_a_real_one(finished: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/unit/serving` compares its answers, when LLAMA_CPP_DIR is set for all of it."""
    assert REAL is not None
    monkeypatch.setenv("LLAMA_CPP_DIR", str(REAL.parent))
    gguf = RunFolder(finished.output_dir).gguf
    for how in ("close", "kill", "kill the program"):
        with ModelServer(gguf, ServerSettings("tiny", context=300)) as server:
            (child,) = psutil.Process(server.process_id).children()
            assert Path(child.exe()) == REAL and server.key not in child.cmdline()
            assert server.context == 300 and server.tokens("Hello")
            if how == "kill":
                os.kill(server.process_id, signal.SIGKILL)
            elif how == "kill the program":
                child.kill()
                assert server.end(20) == "signal 9"
        wait_until(lambda child=child: not child.is_running(), "the program to end")
    broken = gguf.with_name("broken.gguf")
    broken.write_bytes(gguf.read_bytes()[:-5000])
    with pytest.raises(ArtifactError, match=r"can't load it: \w"):
        ModelServer(broken)
    broken.unlink()
