"""A model that is served: a GGUF of a run in llama.cpp's server, with its Modelfile, applied as Ollama does it."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from kolotune.chats.tokens.tokenizer import template_of
from kolotune.chats.tokens.trained_template import trained_folder
from kolotune.llamacpp.model_server import ModelServer, ServerSettings
from kolotune.ollama.modelfile_parser import read_description
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import open_result

from .requests import Defaults

_LOADING = {"context": "num_ctx", "threads": "num_thread", "gpu_layers": "num_gpu", "batch": "num_batch"}
"""Settings of the server, and the parameters that set them."""


class ServedModel:
    """One GGUF of a run, ready to answer requests. A context manager.

    Args:
        run: the run folder.
        quantization: which GGUF; "none" for the unquantized; None: the run's first.
        parallel: requests that are answered at the same time.

    Attributes:
        name: the name it is listed under: the run folder's.
        gguf: the file.
        defaults: what applies where a request says nothing.

    Raises:
        RunFolderError, ArtifactError: there is no such result, or it can't be loaded.
    """

    def __init__(self, run: RunFolder, quantization: str | None, parallel: int = 1) -> None:
        result = open_result(run, quantization)
        self.name, self.gguf = run.root.name, result.gguf
        defaults = Defaults(read_description(result), switches=template_of(trained_folder(run)).switches)
        numbers = {setting: defaults.number(name) for setting, name in _LOADING.items()}
        given: dict[str, Any] = {setting: int(number) for setting, number in numbers.items() if number is not None}
        self._settings = replace(ServerSettings(self.name, parallel=parallel, embeds=True), **given)
        self._server, self._starting = ModelServer(self.gguf, self._settings), threading.Lock()
        ends, takes_tools = self._server.end_texts, self._server.takes_tools
        self.defaults = replace(defaults, end_texts=ends, takes_tools=takes_tools)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End its server."""
        self._server.close()

    @property
    def server(self) -> ModelServer:
        """Its server, started again if it has crashed."""
        with self._starting:
            if self._server.end():
                self._server.close()
                self._server = ModelServer(self.gguf, self._settings)
            return self._server
