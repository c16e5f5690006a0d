"""A model that answers every prompt with one text, behind `serve`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import openai
import uvicorn

from kolotune.foundation.reporter import PlainReporter
from kolotune.llamacpp.model_server import ModelServer, ServerSettings
from kolotune.ollama.modelfile import ModelDescription
from kolotune.serving.app import make_app
from kolotune.serving.requests import Defaults

from .tiny import speaker_gguf
from .waiting import wait_until


class Clients(NamedTuple):
    """OpenAI's clients of `serve` and of the llama.cpp's server behind it."""

    ours: Any
    bare: Any


@contextlib.contextmanager
def serving_text(folder: Path, said: str, template: str, reporter: PlainReporter) -> Iterator[Clients]:
    """Serve a model as "run"; yield clients. See `speaker_gguf` for the arguments."""
    gguf = speaker_gguf(folder, said, template, reporter)
    with ModelServer(gguf, ServerSettings("run", parallel=2)) as server:
        defaults = Defaults(ModelDescription(gguf.name), server.end_texts, takes_tools=server.takes_tools)
        model: Any = SimpleNamespace(name="run", alias="", gguf=gguf, defaults=defaults, server=server)
        app = make_app([model], only_here=True, reporter=reporter)
        front = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=front.run, daemon=True)
        thread.start()
        wait_until(lambda: front.started, "the server to start", pause=0.01)
        port = front.servers[0].sockets[0].getsockname()[1]
        addresses = {f"http://127.0.0.1:{port}": "none", server.address: server.key}
        yield Clients(
            *(
                openai.OpenAI(base_url=f"{address}/v1", api_key=key, http_client=httpx.Client(trust_env=False))
                for address, key in addresses.items()
            )
        )
        front.should_exit = True
        thread.join(10)
