"""The model that is served: its GGUF, the trained template, and its Modelfile, which applies as it does in Ollama."""

from __future__ import annotations

import os
from dataclasses import asdict, fields

from kolotune.chats.tokens.tokenizer import template_of
from kolotune.chats.tokens.trained_template import trained_folder
from kolotune.foundation.config import DEFAULT_TEMPERATURE
from kolotune.foundation.errors import TemplateError
from kolotune.gguf.inference import GeneratedAnswer, GgufModel, Sampling
from kolotune.ollama.modelfile_parser import read_description
from kolotune.ollama.parameters import as_options
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import open_result

from .requests import BadRequest, ChatRequest

_SAMPLING = tuple(field.name for field in fields(Sampling))
_LOADING = {"context": "num_ctx", "repeat_last_n": "repeat_last_n"}
"""Arguments of `GgufModel`, and the parameters that set them."""
_USED = frozenset({*_SAMPLING, "temperature", "stop", "seed", "num_predict", "num_ctx", "repeat_last_n"})


class ServedModel:
    """One GGUF of a run, ready to answer requests.

    Args:
        run: the run folder.
        quantization: which GGUF; "none" for the unquantized; None: the run's first.

    Attributes:
        name: the name it is listed under: the run folder's.
        gguf: the file.
        unused: parameters of the Modelfile that apply only in Ollama.

    Raises:
        RunFolderError, ArtifactError: there is no such result, or it can't be loaded.
    """

    def __init__(self, run: RunFolder, quantization: str | None) -> None:
        result = open_result(run, quantization)
        self._description = read_description(result)
        self._options = as_options(self._description.parameters)
        self._template = template_of(trained_folder(run))
        numbers = {argument: self._number(name) for argument, name in _LOADING.items()}
        self._model = GgufModel(
            result.gguf, **{argument: int(number) for argument, number in numbers.items() if number is not None}
        )
        self.name = run.root.name
        self.gguf = result.gguf
        self.unused = sorted(set(self._options) - _USED)

    def prompt(self, request: ChatRequest) -> list[int]:
        """Return the token ids of a request: the Modelfile's system prompt and turns, then the request's.

        Raises:
            BadRequest: the template refuses the turns, or they exceed the model's context.
        """
        turns = [message.as_turn() for message in request.messages]
        before = [{"role": role, "content": text} for role, text in self._description.messages]
        if self._description.system and turns[0]["role"] != "system":
            before.insert(0, {"role": "system", "content": self._description.system})
        try:
            values = request.chat_template_kwargs or {}
            thinks = any(values.get(name) for name in self._template.switches)
            ids = self._model.tokens(self._template.render([*before, *turns], None, True, thinks))
        except TemplateError as error:
            raise BadRequest(error.cause) from None
        if len(ids) >= self._model.context:
            raise BadRequest(
                f"the conversation has {len(ids)} tokens; with an answer it may have {self._model.context}",
                "context_length_exceeded",
            )
        return ids

    def answer(self, request: ChatRequest, prompt: list[int]) -> GeneratedAnswer:
        """Answer a prompt with the values of the request, else the Modelfile's, else the defaults of `chat`."""
        free = self._model.context - len(prompt)
        own_longest = int(self._number("num_predict") or -1)
        longest = request.longest or (own_longest if own_longest > 0 else free)
        own_seed, own_temperature = self._number("seed"), self._number("temperature")
        seed = int(own_seed) if request.seed is None and own_seed is not None else request.seed
        temperature = DEFAULT_TEMPERATURE if own_temperature is None else own_temperature
        stops = self._options.get("stop", [])
        return self._model.generate(
            prompt,
            (*map(str, stops if isinstance(stops, list) else ()), *request.stops),
            temperature=temperature if request.temperature is None else request.temperature,
            max_tokens=min(longest, free),
            seed=int.from_bytes(os.urandom(4), "big") if seed is None or seed < 0 else seed,
            sampling=self._sampling(request),
        )

    def _sampling(self, request: ChatRequest) -> Sampling:
        own = {name: self._number(name) for name in _SAMPLING}
        requested = {name: getattr(request, name, None) for name in _SAMPLING}
        values = [*own.items(), *requested.items()]
        return Sampling(**{**asdict(Sampling()), **{name: value for name, value in values if value is not None}})

    def _number(self, name: str) -> float | None:
        """The Modelfile's value of a parameter; None where it does not set it."""
        value = self._options.get(name)
        return value if isinstance(value, int | float) else None
