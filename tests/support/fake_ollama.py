"""A fake Ollama server: it follows Ollama's documented API, with faults on demand.

It was written from Ollama's documentation and the behaviour of its source (v0.33). It uses what it is sent: blobs are
stored on disk, Go's text/template renders the template, and llama.cpp answers from the stored GGUF. Only a real server
can show which template it chooses where it was given none, how it shortens a conversation that is too long, and whether
a version behaves differently.
"""

from __future__ import annotations

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

from kolotune.foundation.quantization_types import FILE_TYPES
from kolotune.gguf import header
from kolotune.gguf.inference import GgufModel, Sampling
from support.fake_ollama_http import Refused, handler_for
from support.go_templates import Renderer, job
from support.ollama_texts import format_modelfile, format_parameters

_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(rf"(?:(?:[A-Za-z0-9_][A-Za-z0-9_.:-]*/)?[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}}/)?{_PART}(?::{_PART})?")
_OPTIONS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.0, "num_predict": -1}

FakeModel = dict[str, Any]
"""A model: name, digest of its weights, template, system, licenses, parameters, messages, time of change."""
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
    "error in chat": "an error line in a stream with status 200",
    "chat breaks off": "the stream ends before done",
    "no JSON": "a web page instead of a response",
    "silent": "no response to any request",
}


@dataclass
class FakeOllama:
    """One server on a free port of this machine, which keeps its models in a folder.

    Attributes:
        folder: the folder.
        renderer: renders Go templates; None: chats are refused.
        version: the version that it reports.
        fault: a key of `FAULTS`, or "".
        requests: method, path, and length of the body of every request.
        models: the models by full name.
        prompts: the prompt of every chat.
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
        self.models: dict[str, FakeModel] = {}
        self.prompts: list[str] = []
        self.released = threading.Event()
        self._loaded: dict[tuple[Path, int], GgufModel] = {}
        self._busy = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(self))
        self._http.daemon_threads = True
        self.host = f"127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        while self._loaded:  # now, not when garbage is collected: llama.cpp writes to standard error
            self._loaded.popitem()[1]._model.close()

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

    def model_named(self, name: str) -> FakeModel:
        full = self.full_name(name)
        if full not in self.models:
            raise Refused(404, f"model '{name}' not found")
        return self.models[full]

    def layer(self, text: str) -> str:
        """Store a text as a blob; return the status line for it."""
        data = text.encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        new = not self.blob(digest).exists()
        self.blob(digest).write_bytes(data)
        return f"{'creating new' if new else 'using existing'} layer {digest}"

    # ------------------------------------------------------------ responses

    def create(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        full, digest = self._to_create(request)
        yield {"status": "parsing GGUF"}
        if self.fault == "error in create":
            yield {"error": "this GGUF is of no use"}
            return
        header.read(self.blob(digest))
        yield {"status": f"using existing layer {digest}"}
        texts = {name: request.get(name) for name in ("template", "system") if request.get(name)}
        license_ = request.get("license") or []
        licenses = [license_] if isinstance(license_, str) else license_
        texts |= {f"license {number}": text for number, text in enumerate(licenses)}
        if request.get("parameters"):
            texts["parameters"] = json.dumps(request["parameters"])
        if request.get("messages"):
            texts["messages"] = json.dumps(request["messages"])
        for text in texts.values():
            yield {"status": self.layer(text)}
        if self.fault == "create breaks off":
            return
        yield {"status": "writing manifest"}
        if self.fault != "forgets":
            self.models[full] = {
                "name": full,
                "digest": digest,
                "template": request.get("template") or "",
                "system": request.get("system") or "",
                "licenses": licenses,
                "parameters": request.get("parameters") or {},
                "messages": request.get("messages") or [],
                "modified": _now(),
            }
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
        model = dict(self.model_named(name))
        if self.fault == "another template":
            model["template"] = "{{ .Prompt }}"
        if self.fault == "another stop":
            model["parameters"] = model["parameters"] | {"stop": model["parameters"]["stop"][1:]}
        if self.fault == "other weights":
            model["digest"] = f"sha256:{'0' * 64}"
        path = self.blob(model["digest"])
        summary = header.read(self.blob(self.model_named(name)["digest"]))
        kinds = {number: kind for kind, number in FILE_TYPES.items()} | {0: "F32", 1: "F16"}
        answer = {
            "license": "\n".join(model["licenses"]),
            "modelfile": format_modelfile(model, path),
            "parameters": "\n".join(format_parameters(model["parameters"])),
            "template": model["template"] or "{{ .Prompt }}",
            "system": model["system"],
            "details": {
                "parent_model": "",
                "format": "gguf",
                "family": summary.architecture,
                "families": [summary.architecture],
                "parameter_size": f"{sum(math.prod(tensor.shape) for tensor in summary.tensors.values()) / 1e6:.2f}M",
                "quantization_level": kinds.get(summary.fields.get("general.file_type", -1), "unknown"),
            },
            "messages": model["messages"],
            "model_info": {key: value for key, value in summary.fields.items() if isinstance(value, (int, float, str))},
            "capabilities": ["completion"],
            "modified_at": model["modified"],
        }
        return {key: value for key, value in answer.items() if value not in ("", [])}

    def tags(self) -> dict[str, Any]:
        return {
            "models": [
                {
                    "name": name,
                    "model": name,
                    "modified_at": model["modified"],
                    "size": self.blob(model["digest"]).stat().st_size,
                    "digest": hashlib.sha256(json.dumps(model).encode()).hexdigest(),
                    "details": {"format": "gguf"},
                }
                for name, model in self.models.items()
            ]
        }

    def chat(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        model, turns = self.model_named(request.get("model", "")), list(request.get("messages") or [])
        began, name = time.monotonic_ns(), request["model"]
        options = {**_OPTIONS, **model["parameters"], **(request.get("options") or {})}
        if self.renderer is None or not model["template"]:
            raise Refused(500, "this server renders no templates")
        all_turns = [*model["messages"], *turns]
        if turns[0]["role"] != "system" and model["system"]:
            all_turns.insert(0, {"role": "system", "content": model["system"]})
        prompt = self.renderer([job(model["template"], [all_turns])])[0][0]
        self.prompts.append(prompt)
        with self._busy:
            context = int(options.get("num_ctx", 4096))
            key = (self.blob(model["digest"]), context)
            if key not in self._loaded:
                self._loaded[key] = GgufModel(key[0], context=context)
            loaded = self._loaded[key]
            # In Ollama the GGUF decides whether a BOS is added before the prompt.
            ids = loaded._model.tokenize(prompt.encode(), add_bos=True, special=True)
            limit = int(options["num_predict"])
            answer = loaded.generate(
                ids,
                options.get("stop", []),
                temperature=float(options["temperature"]),
                max_tokens=limit if limit > 0 else context - len(ids),
                seed=int(options.get("seed", 0)),
                sampling=Sampling(
                    int(options["top_k"]), float(options["top_p"]), float(options["min_p"]),
                    repeat_penalty=float(options["repeat_penalty"]),
                ),
            )  # fmt: skip
            for number, piece in enumerate(answer):
                if self.fault and number == 2:
                    if self.fault == "error in chat":
                        yield {"error": "the model fell over"}
                    return
                message = {"role": "assistant", "content": piece}
                yield {"model": name, "created_at": _now(), "message": message, "done": False}
        yield {
            "model": name,
            "created_at": _now(),
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": answer.reason,
            "total_duration": time.monotonic_ns() - began,
            "load_duration": 1,
            "prompt_eval_count": len(ids),
            "prompt_eval_duration": 1,
            "eval_count": answer.tokens,
            "eval_duration": 1,
        }


@pytest.fixture
def fake_ollama(tmp_path: Path, go: Renderer) -> Iterator[FakeOllama]:
    """A fake server."""
    server = FakeOllama(tmp_path / "ollama", go)
    yield server
    server.close()


@pytest.fixture
def any_ollama(request: pytest.FixtureRequest) -> str:
    """The address of an Ollama server: the real one that OLLAMA_HOST names, else a fake one."""
    real = os.environ.get("OLLAMA_HOST")
    return real if real else str(request.getfixturevalue("fake_ollama").host)


only_real = pytest.mark.skipif(not os.environ.get("OLLAMA_HOST"), reason="needs a real Ollama: set OLLAMA_HOST")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
