"""A model that is served: a GGUF of a run in llama.cpp's server, with its Modelfile, applied as Ollama does it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kolotune.chats.tokens.tokenizer import template_of
from kolotune.chats.tokens.trained_template import trained_folder
from kolotune.foundation.closing import Closing
from kolotune.llamacpp.model_server import ModelServer, ServerSettings
from kolotune.ollama.modelfile_parser import read_description
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import Result, open_result

from .requests import Defaults

_LOADING = {"context": "num_ctx", "threads": "num_thread", "gpu_layers": "num_gpu", "batch": "num_batch"}
"""Settings of the server, and the parameters that set them."""
_ALIAS = "model"
"""For a run whose name would be several for llama.cpp's server, which separates them by commas."""


class RunningServer:
    """llama.cpp's server for a GGUF, started again after a crash.

    Args:
        gguf: the file.
        settings: how it is served.
    """

    def __init__(self, gguf: Path, settings: ServerSettings) -> None:
        self._gguf, self._settings = gguf, settings
        self._server, self._starting = ModelServer(gguf, settings), threading.Lock()

    @property
    def server(self) -> ModelServer:
        """The server, started again if it has crashed."""
        with self._starting:
            if self._server.end():
                self._server.close()
                self._server = ModelServer(self._gguf, self._settings)
            return self._server

    def close(self) -> None:
        """End it."""
        self._server.close()


@dataclass(frozen=True)
class SharedServer:
    """A server that several runs share, and the adapter of one of them.

    Attributes:
        running: the server, for the runs' base model.
        number: of the run's adapter.
        count: of adapters.
        alias: the model's name in the server's responses.
    """

    running: RunningServer
    number: int
    count: int
    alias: str


class ServedModel(Closing):
    """A run's result, ready to answer requests. A context manager.

    Args:
        run: the run folder.
        quantization: which GGUF; "none" for the unquantized; None: the run's first.
        parallel: requests that are answered at the same time.
        shared: the server that answers with the run's adapter; None: a server of its own, with the run's GGUF.

    Attributes:
        name: the name it is listed under: the run folder's.
        gguf: the run's file.
        defaults: what applies where a request says nothing.
        alias: the name in the server's responses, where that is another one; "" otherwise.

    Raises:
        RunFolderError, ArtifactError: there is no such result, or it can't be loaded.
    """

    def __init__(
        self, run: RunFolder, quantization: str | None, parallel: int = 1, shared: SharedServer | None = None
    ) -> None:
        result = open_result(run, quantization)
        self.name, self.gguf = run.root.name, result.gguf
        defaults = _defaults(run, result)
        if shared is None:
            settings = _settings(run, defaults, parallel)
            self._running = RunningServer(result.gguf, settings)
            self.alias = "" if settings.name == self.name else settings.name
        else:
            self._running, self.alias = shared.running, shared.alias
            adapters = tuple(float(number == shared.number) for number in range(shared.count))
            defaults = replace(defaults, adapters=adapters)
        ends, takes_tools = self.server.end_texts, self.server.takes_tools
        self.defaults = replace(defaults, end_texts=ends, takes_tools=takes_tools)

    def close(self) -> None:
        """End its server, also for others that share it."""
        self._running.close()

    @property
    def server(self) -> ModelServer:
        """Its server, started again if it has crashed."""
        return self._running.server


def server_settings(run: RunFolder, quantization: str | None, parallel: int) -> ServerSettings:
    """Return how a result is served on a server of its own."""
    return _settings(run, _defaults(run, open_result(run, quantization)), parallel)


def _defaults(run: RunFolder, result: Result) -> Defaults:
    return Defaults(read_description(result), switches=template_of(trained_folder(run)).switches)


def _settings(run: RunFolder, defaults: Defaults, parallel: int) -> ServerSettings:
    numbers = {setting: defaults.number(name) for setting, name in _LOADING.items()}
    given: dict[str, Any] = {setting: int(number) for setting, number in numbers.items() if number is not None}
    name = run.root.name
    is_one = "," not in name and name == name.strip()
    return replace(ServerSettings(name if is_one else _ALIAS, parallel=parallel, embeds=True), **given)
