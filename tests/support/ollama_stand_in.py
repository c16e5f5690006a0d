"""A stand-in for an Ollama server: it does what a real one was seen to do, and has faults on demand.

It was written from Ollama's documentation, its source (v0.33) and the answers of a real server, which a test compares
with its own (`observed`). It uses what it is sent: llama.cpp's writer passes the GGUF on, Go's text/template or
llama.cpp's server renders the prompts, and llama.cpp answers from the stored file. It is no proof of what a real server
does: that takes a real one (`any_ollama`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.quantization_types import FILE_TYPES
from kolotune.gguf import header
from kolotune.llamacpp.model_server import ModelServer, ServerSettings
from kolotune.ollama.prompt_path import READS_JINJA, PromptPath
from support.go_templates import Renderer
from support.llamacpp_writer import copy_gguf
from support.ollama_stand_in_http import handler_for
from support.ollama_stand_in_prompts import Messages, PromptRenderer, Refused, StoredModel, known_template
from support.ollama_texts import format_modelfile, format_parameters

_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(rf"(?:(?:[A-Za-z0-9_][A-Za-z0-9_.:-]*/)?[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}}/)?{_PART}(?::{_PART})?")
_OPTIONS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.0, "num_predict": -1}
_RENDERS_FOR_DEBUGGING = (0, 12, 0)
_TOO_LONG = "the prompt is longer than the context length currently available to the model"

FAULTS = {
    "down in blob": "the connection ends in the middle of a blob",
    "damage in blob": "a byte of the blob changes on the way",
    "full disk": "status 500 while a blob is received",
    "error in create": "an error line in a stream with status 200",
    "create refused": "status 400",
    "create breaks off": "the stream ends before success",
    "create cut": "the connection ends within a line",
    "silent create": "no response before the client's timeout",
    "another template": "show returns a template that was not sent",
    "another stop": "show lacks a stop string",
    "other weights": "show names a different blob",
    "forgets": "show does not know the model that was created",
    "template forced": "OLLAMA_GO_TEMPLATE=1 in the server's environment",
    "another prompt": "a rendered prompt has one more character",
    "another count": "one more token is counted in a prompt",
    "error in chat": "an error line in a stream with status 200",
    "chat breaks off": "the stream ends before done",
    "no JSON": "a web page instead of a response",
    "silent": "no response to any request",
}


@dataclass
class OllamaStandIn:
    """One server on a free port of this machine, which keeps its models in a folder.

    Attributes:
        folder: the folder.
        renderer: renders Go templates; None: chats that need one are refused.
        version: the version that it reports, and whose behaviour it has.
        fault: a key of `FAULTS`, or "".
        requests: method, path, and length of the body of every request.
        models: the models by full name.
        prompts: the prompt of every chat that was answered.
        released: set when the server closes; ends waiting requests.
        host: address and port.
    """

    folder: Path
    renderer: Renderer | None = None
    version: str = "0.33.0"
    fault: str = ""
    requests: list[tuple[str, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
        self.models: dict[str, StoredModel] = {}
        self.prompts: list[str] = []
        self.released = threading.Event()
        self._renderers: dict[str, PromptRenderer] = {}
        self._loaded: dict[tuple[Path, int], ModelServer] = {}
        self._busy = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(self))
        self._http.daemon_threads = True
        self.host = f"127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        while self._renderers:
            self._renderers.popitem()[1].close()
        while self._loaded:
            self._loaded.popitem()[1].close()

    @property
    def _prompts_of(self) -> PromptRenderer:
        """The renderer of the version that the server has now."""
        if self.version not in self._renderers:
            self._renderers[self.version] = PromptRenderer(self.renderer, self.version)
        return self._renderers[self.version]

    def count_requests(self, method: str, prefix: str) -> int:
        """Return the number of requests of a method whose path has a prefix."""
        return sum(verb == method and path.startswith(prefix) for verb, path, _ in self.requests)

    # ------------------------------------------------------------ models

    def blob(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise Refused(400, "invalid digest format")
        return self.folder / "blobs" / digest.replace(":", "-")

    def full_name(self, name: str) -> str:
        """Return the name with its tag, in the case of an existing model: names that differ only in case are equal."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise Refused(400, "invalid model name")
        full = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
        return next((existing for existing in self.models if existing.lower() == full.lower()), full)

    def model_named(self, name: str) -> StoredModel:
        full = self.full_name(name)
        if full not in self.models:
            raise Refused(404, f"model '{name}' not found")
        return self.models[full]

    def _store(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blob(digest).write_bytes(data)
        return digest

    def layer(self, text: str) -> str:
        """Store a text as a blob; return the status line for it."""
        digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        new = not self.blob(digest).exists()
        return f"{'creating new' if new else 'using existing'} layer {self._store(text.encode())}"

    def _stored_weights(self, digest: str) -> str:
        """Return the digest of a GGUF once it went through llama.cpp's writer, as in `llama-quantize … COPY`."""
        if self._prompts_of.version and self._prompts_of.version < READS_JINJA:
            return digest
        partial = self.folder / f"{threading.get_ident()}.COPY"
        try:
            copy_gguf(self.blob(digest), partial)
            return self._store(partial.read_bytes())
        finally:
            partial.unlink(missing_ok=True)

    # ------------------------------------------------------------ responses

    def create(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        full, digest = self._to_create(request)
        yield {"status": "parsing GGUF"}
        if self.fault == "error in create":
            yield {"error": "this GGUF is of no use"}
            return
        try:
            summary = header.read(self.blob(digest))
        except ArtifactError as error:
            yield {"error": error.cause}
            return
        license_ = request.get("license") or []
        model = StoredModel(
            full,
            self._stored_weights(digest),
            request.get("template") or "",
            None,
            request.get("system") or "",
            [license_] if isinstance(license_, str) else license_,
            dict(request.get("parameters") or {}),
            request.get("messages") or [],
            request.get("renderer") or "",
            request.get("parser") or "",
            _now(),
        )
        yield {"status": "validating GGUF model", "digest": "0" * 19, "total": 1, "completed": 1}
        yield {"status": f"using existing layer {model.digest}"}
        self._prompts_of.set_by_architecture(model, self.blob(model.digest))
        if chosen := known_template(str(summary.fields.get("tokenizer.chat_template", ""))):
            model.known = chosen
            model.parameters.setdefault("stop", ["<|im_start|>", "<|im_end|>"])
            yield {"status": "using autodetected template chatml"}
        for text in _layers(model):
            yield {"status": self.layer(text)}
        if self.fault == "create breaks off":
            return
        yield {"status": "writing manifest"}
        if self.fault != "forgets":
            self.models[full] = model
        yield {"status": "success"}

    def _to_create(self, request: dict[str, Any]) -> tuple[str, str]:
        """Return the full name and the digest of the weights, if the request is valid."""
        full, files = self.full_name(request.get("model") or request.get("name") or ""), request.get("files")
        if "typical_p" in (request.get("parameters") or {}):
            raise Refused(400, "typical_p is deprecated and cannot be set as a model parameter")
        if request.get("adapters"):
            raise Refused(400, "LoRA adapters are no longer supported")
        if self.fault == "create refused":
            raise Refused(400, "no place for that")
        if not files:
            raise Refused(400, "neither 'from' or 'files' was specified")
        ((file, digest),) = files.items()
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise Refused(400, f"file path must be relative: {file}")
        if not self.blob(digest).exists():
            raise Refused(400, f"blob not found for {file} (digest {digest})")
        return full, digest

    def show(self, name: str) -> dict[str, Any]:
        model = self.model_named(name)
        parameters, digest = model.parameters, model.digest
        if self.fault == "another stop":
            parameters = parameters | {"stop": parameters["stop"][1:]}
        if self.fault == "other weights":
            digest = f"sha256:{'0' * 64}"
        gguf = self.blob(model.digest)
        rule = self._prompts_of.rule(model, gguf, self.fault == "template forced")
        named = {str(capability) for capability in rule.capabilities}
        last = ["completion"] if rule.path is PromptPath.JINJA else []  # as the real one's order
        summary = header.read(gguf)
        kinds = {number: kind for kind, number in FILE_TYPES.items()} | {0: "F32", 1: "F16"}
        answer = {
            "license": "\n".join(model.licenses),
            "modelfile": format_modelfile(model, parameters, self.blob(digest)),
            "parameters": "\n".join(format_parameters(parameters)),
            "template": "{{ .Prompt }}" if self.fault == "another template" else rule.template,
            "system": model.system,
            "renderer": model.renderer,
            "parser": model.parser,
            "details": {
                "parent_model": "",
                "format": "gguf",
                "family": summary.architecture,
                "families": [summary.architecture],
                "parameter_size": f"{sum(math.prod(tensor.shape) for tensor in summary.tensors.values()) / 1e6:.2f}M",
                "quantization_level": kinds.get(summary.fields.get("general.file_type", -1), "unknown"),
            },
            "messages": model.messages,
            "model_info": {
                key: value
                for key, value in summary.fields.items()
                if isinstance(value, (int, float, str)) and key not in ("general.name", "tokenizer.chat_template")
            },
            "capabilities": sorted(named - set(last), key=["completion", "tools", "insert", "thinking"].index) + last,
            "modified_at": model.modified,
        }
        return {key: value for key, value in answer.items() if value not in ("", [])}

    def tags(self) -> dict[str, Any]:
        return {
            "models": [
                {
                    "name": name,
                    "model": name,
                    "modified_at": model.modified,
                    "size": self.blob(model.digest).stat().st_size,
                    "digest": hashlib.sha256(repr(model).encode()).hexdigest(),
                    "details": {"format": "gguf"},
                }
                for name, model in self.models.items()
            ]
        }

    # ------------------------------------------------------------ chats

    def chat(self, request: dict[str, Any]) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answer a chat: an object, or the events of a stream."""
        model, name = self.model_named(request.get("model", "")), request["model"]
        began = time.monotonic_ns()
        turns: Messages = list(request.get("messages") or [])
        _check_arguments(turns)
        gguf = self.blob(model.digest)
        rule = self._prompts_of.rule(model, gguf, self.fault == "template forced")
        tools, think = list(request.get("tools") or []), request.get("think")
        if tools and not rule.tools:
            raise Refused(400, f"{name} does not support tools")
        if "thinking" in rule.capabilities:
            think = True if think is None else think
        elif think:
            raise Refused(400, f'"{name}" does not support thinking')
        answer = {"model": name, "created_at": _now(), "message": {"role": "assistant", "content": ""}}
        if not turns:
            return {**answer, "done": True, "done_reason": "load"}
        all_turns = [*model.messages, *turns]
        if turns[0]["role"] != "system" and model.system:
            all_turns.insert(0, {"role": "system", "content": model.system})
        options = {**_OPTIONS, **model.parameters, **(request.get("options") or {})}
        with self._busy:
            loaded = self._load(gguf, int(options.get("num_ctx", 4096)))
            context = min(loaded.context, int(options.get("num_ctx", 4096)))
            prompt, ids = self._fitting(
                loaded, context, lambda messages: self._prompts_of.render(rule, gguf, messages, tools, think), all_turns
            )
        if self.fault == "another prompt":
            prompt += " "
        version = self._prompts_of.version
        if request.get("_debug_render_only") and (not version or version >= _RENDERS_FOR_DEBUGGING):
            return {**answer, "done": False, "_debug_info": {"rendered_template": prompt}}
        if len(ids) >= context:
            if rule.path is PromptPath.JINJA:
                raise Refused(400, _TOO_LONG)
            return {**answer, "done": True, "done_reason": "length", "prompt_eval_count": len(ids), "eval_count": 0}
        self.prompts.append(prompt)
        return self._answer(loaded, context, ids, options, answer, began)

    def _load(self, gguf: Path, context: int) -> ModelServer:
        key = (gguf, context)
        if key not in self._loaded:
            self._loaded[key] = ModelServer(gguf, ServerSettings(context=context))
        return self._loaded[key]

    @staticmethod
    def _fitting(loaded: ModelServer, context: int, render: Any, turns: Messages) -> tuple[str, list[int]]:
        """Return the prompt and its tokens, without the oldest turns where all are too long; system turns stay."""
        for start in range(len(turns)):
            kept = [turn for turn in turns[:start] if turn["role"] == "system"] + turns[start:]
            prompt = render(kept)
            # In Ollama the GGUF decides whether a BOS is added before the prompt.
            ids = loaded.tokens(prompt, adds_special=True)
            if len(ids) <= context:
                break
        return prompt, ids

    def _answer(
        self,
        loaded: ModelServer,
        context: int,
        ids: list[int],
        options: dict[str, Any],
        head: dict[str, Any],
        began: int,
    ) -> Iterator[dict[str, Any]]:
        limit = int(options["num_predict"])
        request = {name: options[name] for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")}
        request |= {"seed": int(options.get("seed", 0)), "stop": [*options.get("stop", []), *loaded.end_texts]}
        request |= {"n_predict": limit if limit > 0 else context - len(ids), "prompt": ids}
        last: dict[str, Any] = {}
        with self._busy, contextlib.closing(loaded.events("/completion", request)) as events:
            for number, event in enumerate(events):
                if self.fault and number == 2:
                    if self.fault == "error in chat":
                        yield {"error": "the model fell over"}
                    return
                if content := event["content"]:
                    yield {**head, "message": {"role": "assistant", "content": content}, "done": False}
                last = event
        yield {
            **head,
            "done": True,
            "done_reason": "length" if last["stop_type"] == "limit" else "stop",
            "total_duration": time.monotonic_ns() - began,
            "load_duration": 1,
            "prompt_eval_count": len(ids) + (self.fault == "another count"),
            "prompt_eval_duration": 1,
            "eval_count": last["tokens_predicted"],
            "eval_duration": 1,
        }


def _layers(model: StoredModel) -> Iterator[str]:
    """Yield the texts that become layers of a model."""
    yield from filter(None, (model.template or model.known, model.system, *model.licenses))
    for value in (model.parameters, model.messages):
        if value:
            yield json.dumps(value)


def _check_arguments(turns: Messages) -> None:
    """Refuse tool calls whose arguments are a text."""
    for turn in turns:
        for call in turn.get("tool_calls") or []:
            if isinstance(call["function"].get("arguments"), str):
                kind = "api.ToolCallFunctionArguments"
                raise Refused(400, f"json: cannot unmarshal string into Go value of type {kind}")


@pytest.fixture
def ollama_stand_in(tmp_path: Path, go: Renderer) -> Iterator[OllamaStandIn]:
    """A stand-in server."""
    server = OllamaStandIn(tmp_path / "ollama", go)
    yield server
    server.close()


@pytest.fixture
def any_ollama(request: pytest.FixtureRequest) -> str:
    """The address of an Ollama server: the real one that OLLAMA_HOST names, else the stand-in.

    With KOLOTUNE_REAL_OLLAMA in the environment, there has to be a real one.
    """
    real = os.environ.get("OLLAMA_HOST")
    if not real and os.environ.get("KOLOTUNE_REAL_OLLAMA"):
        pytest.fail("KOLOTUNE_REAL_OLLAMA is set, but OLLAMA_HOST names no server")
    return real if real else str(request.getfixturevalue("ollama_stand_in").host)


only_real = pytest.mark.skipif(not os.environ.get("OLLAMA_HOST"), reason="needs a real Ollama: set OLLAMA_HOST")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
