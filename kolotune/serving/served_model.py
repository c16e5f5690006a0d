"""The model that is served: the GGUF, the trained template, and what the Modelfile says, as Ollama would take it."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from typing import Any

from kolotune.chats.tokens.tokenizer import template_of
from kolotune.foundation.config import DEFAULT_TEMPERATURE
from kolotune.foundation.errors import TemplateError
from kolotune.gguf.inference import GeneratedAnswer, GgufModel, Sampling
from kolotune.ollama.client import as_options
from kolotune.ollama.install import described
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import open_result
from kolotune.stages import modelfile

from .requests import BadRequest, ChatRequest

_SAMPLING = tuple(each.name for each in fields(Sampling))
_USED = frozenset({*_SAMPLING, "temperature", "stop", "seed", "num_predict", "num_ctx", "repeat_last_n"})


class ServedModel:
    """One GGUF of a run with all that belongs to it.

    Args:
        run: the run folder.
        quantization: which one; "none" for the unquantized; None: the run's first.

    Attributes:
        name: under which it is listed: the run folder's.
        gguf: the file.
        unused: parameters of the Modelfile that mean something to Ollama only.

    Raises:
        RunFolderError, ArtifactError: there is no such result, or it can't be loaded.
    """

    def __init__(self, run: RunFolder, quantization: str | None) -> None:
        result = open_result(run, quantization)
        self._says = described(result)
        self._options = as_options(self._says)
        self._template = template_of(modelfile.tokenizer_folder(run))
        load = {"context": "num_ctx", "repeat_last_n": "repeat_last_n"}
        given = {ours: int(self._options[theirs]) for ours, theirs in load.items() if theirs in self._options}
        self._model = GgufModel(result.gguf, **given)
        self.name = run.root.name
        self.gguf = result.gguf
        self.unused = sorted(set(self._options) - _USED)

    def prompt(self, request: ChatRequest) -> list[int]:
        """The token ids of a request: the Modelfile's system prompt and turns first, then the request's.

        Raises:
            BadRequest: the template refuses the turns, or they are longer than the model can read.
        """
        turns = [message.plain() for message in request.messages]
        before = [{"role": role, "content": text} for role, text in self._says.messages]
        if self._says.system and turns[0]["role"] != "system":
            before.insert(0, {"role": "system", "content": self._says.system})
        try:
            ids = self._model.tokens(self._template.render([*before, *turns], None, True))
        except TemplateError as error:
            raise BadRequest(error.cause) from None
        if len(ids) >= self._model.context:
            raise BadRequest(
                f"the conversation has {len(ids)} tokens; with an answer it may have {self._model.context}",
                "context_length_exceeded",
            )
        return ids

    def answer(self, request: ChatRequest, prompt: list[int]) -> GeneratedAnswer:
        """The answer to a prompt: what the request wants counts, then the Modelfile, then what `chat` does."""
        room = self._model.context - len(prompt)
        own = int(self._options.get("num_predict", -1))
        longest = request.longest or (own if own > 0 else room)
        seed = self._options.get("seed") if request.seed is None else request.seed
        temperature = self._options.get("temperature", DEFAULT_TEMPERATURE)
        return self._model.generate(
            prompt,
            (*self._options.get("stop", ()), *request.stops),
            temperature=temperature if request.temperature is None else request.temperature,
            max_tokens=min(longest, room),
            seed=int.from_bytes(os.urandom(4), "big") if seed is None or seed < 0 else seed,
            sampling=self._sampling(request),
        )

    def _sampling(self, request: ChatRequest) -> Sampling:
        chosen: dict[str, Any] = asdict(Sampling())
        for name in _SAMPLING:
            wanted = getattr(request, name, None)
            chosen[name] = self._options.get(name, chosen[name]) if wanted is None else wanted
        return Sampling(**chosen)
