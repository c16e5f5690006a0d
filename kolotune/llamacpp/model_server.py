"""llama.cpp's own server for a GGUF: it renders prompts, generates answers, and tokenizes texts.

It is a child process on the loopback interface, with a key that only this process has. So a model that crashes takes
nothing with it, and nobody else on this machine can use it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.closing import Closing
from kolotune.foundation.errors import ArtifactError, ConfigError, KolotuneError, ToolchainError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.weights.gguf_metadata import read_metadata

from .child_server import ChildServer

_PROCESS = "kolotune.llamacpp.model_server_process"
_START_SECONDS = 3600.0  # a large model from a slow disk
TOO_LONG = "exceed_context_size_error"
"""The type of llama.cpp's error for a prompt that does not fit the context."""
_DEATH_SECONDS = 2.0  # between the end of a connection and that of its process
_DATA, _DONE = b"data: ", b"[DONE]"


@dataclass(frozen=True)
class ServerSettings:
    """How a GGUF is served.

    Attributes:
        name: the model's name in responses.
        context: tokens of prompt and answer together; 0, or more than the model's own limit, stands for that limit.
        parallel: requests that are answered at the same time; each has the whole context.
        template: a chat template in place of the GGUF's; "" for the GGUF's own.
        threads: None for OMP_NUM_THREADS, or as many as there are cores.
        gpu_layers: layers in the memory of a GPU, if there is one; -1 for all.
        batch: tokens of prompts that are computed at once.
        embeds: whether embeddings can be asked for, too.
        adapters: GGUFs of adapters. A request for an answer has to say how strong each of them is (``lora``).
    """

    name: str = "model"
    context: int = 4096
    parallel: int = 1
    template: str = ""
    threads: int | None = None
    gpu_layers: int = -1
    batch: int = 2048
    embeds: bool = False
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Slot:
    n_ctx: int


@dataclass(frozen=True)
class _Properties:
    default_generation_settings: _Slot
    chat_template_caps: dict[str, bool] = field(default_factory=dict)


class ModelServer(Closing):
    """A GGUF in llama.cpp's server. A context manager; it can be used by several threads.

    Args:
        gguf: the file.
        settings: how it is served.

    Attributes:
        context: tokens of prompt and answer together.
        takes_tools: whether the chat template has a place for tools; without one, requests with tools are answered as
            if they had none.
        end_texts: the texts of the tokens that end an answer, which have to be among the stops of a request: the server
            shows special tokens, so that they can be stops.
        key: what requests must have.
        headers: the same as headers.

    Raises:
        ArtifactError: it is not a whole GGUF, or llama.cpp can't load it.
        ToolchainError: xllamacpp is not installed, or can't be loaded.
    """

    def __init__(self, gguf: Path, settings: ServerSettings | None = None) -> None:
        import httpx

        settings = settings or ServerSettings()
        task = {**asdict(settings), "path": str(gguf.absolute()), "context": _context(gguf, settings.context)}
        self._server = ChildServer(_PROCESS, task, seconds=_START_SECONDS, explain=lambda said: _explained(gguf, said))
        self.key, self.headers = self._server.key, self._server.headers
        # The server closes connections after a stream: none is used twice.
        self._client = httpx.Client(
            base_url=self.address,
            headers=self.headers,
            trust_env=False,
            timeout=None,
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        properties = typed_storage.parse(_Properties, self._client.get("/props").text)
        self.context = properties.default_generation_settings.n_ctx
        self.takes_tools = properties.chat_template_caps.get("supports_tools", False)
        self.end_texts = self._end_texts()

    def close(self) -> None:
        """End the server."""
        self._client.close()
        self._server.close()

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._server.address

    @property
    def process_id(self) -> int:
        """The id of its process."""
        return self._server.process_id

    def end(self, seconds: float = 0.0) -> str:
        """Return what ended its process, such as "signal 9"; "" when it still runs after some seconds."""
        code = self._server.exit_code(seconds)
        return "" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"

    def crash(self) -> ToolchainError:
        """Return the error for a connection that broke."""
        reason = self.end(_DEATH_SECONDS) or "the connection broke"
        return ToolchainError(f"llama.cpp ended while it computed ({reason})")

    def tokens(self, text: str, *, adds_special: bool = False) -> list[int]:
        """Return the tokens of a text, with special tokens recognised.

        Args:
            text: the text.
            adds_special: add a BOS where the tokenizer does.
        """
        request = {"content": text, "add_special": adds_special, "parse_special": True}
        return typed_storage.convert(list[int], self.post("/tokenize", request)["tokens"])

    def prompt(self, request: Mapping[str, object]) -> str:
        """Return the text of the prompt that it makes of a request for a chat completion."""
        return str(self.post("/apply-template", request)["prompt"])

    def post(self, path: str, request: Mapping[str, object]) -> JsonObject:
        """Return the response to a request.

        Raises:
            ConfigError: the server refuses it.
            ToolchainError: llama.cpp has crashed.
        """
        import httpx

        try:
            response = self._client.post(path, content=json.dumps(request).encode())
        except httpx.HTTPError:
            raise self.crash() from None
        fields = typed_storage.parse_object(response.text)
        if "error" in fields:
            raise _refusal(fields["error"])
        return fields

    def events(self, path: str, request: Mapping[str, object]) -> Generator[JsonObject]:
        """Yield the events of a streamed response; closing the iterator ends the computation.

        Raises:
            ConfigError: the server refuses the request.
            ToolchainError: llama.cpp has crashed.
        """
        import httpx

        body = json.dumps({**request, "stream": True}).encode()
        try:
            with self._client.stream("POST", path, content=body) as response:
                if response.is_error:
                    raise _refusal(typed_storage.parse_object(response.read()).get("error"))
                for line in _lines(response.iter_bytes()):
                    if line.startswith(_DATA) and (data := line.removeprefix(_DATA)) != _DONE:
                        event = typed_storage.parse_object(data)
                        if "error" in event:
                            raise _refusal(event["error"])
                        yield event
        except httpx.HTTPError:
            raise self.crash() from None

    def _end_texts(self) -> tuple[str, ...]:
        """Ask which tokens end an answer: they are those that it would suppress on demand."""
        field = "generation_settings/logit_bias"
        request = {"prompt": [0], "n_predict": 0, "ignore_eos": True, "response_fields": [field]}
        suppressed = typed_storage.convert(list[JsonObject], self.post("/completion", request)[field])
        texts = [str(self.post("/detokenize", {"tokens": [each["token"]]})["content"]) for each in suppressed]
        return tuple(dict.fromkeys(filter(None, texts)))


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream. Only a line feed ends one: texts may contain all of Unicode's line ends."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def _context(gguf: Path, wanted: int) -> int:
    """Return how many tokens to ask for."""
    metadata = read_metadata(gguf)
    limit = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if not isinstance(limit, int):
        return wanted
    return min(wanted or limit, limit)


def _explained(gguf: Path, said: str) -> KolotuneError:
    """Return what ended the child as it started."""
    problem = next((line.partition(" E ")[2] for line in said.splitlines() if " E " in line), "")
    if problem or not said:
        return ArtifactError(f"{gguf}: llama.cpp can't load it{': ' if problem else ''}{problem.strip()}")
    return ToolchainError(f"llama.cpp's server can't be started: {said.splitlines()[-1]}")


def _refusal(error: object) -> ConfigError:
    fields = error if isinstance(error, dict) else {"message": error}
    if fields.get("type") == TOO_LONG:
        return ConfigError(
            f"the conversation is longer than the model's context: {fields.get('n_prompt_tokens')} tokens of "
            f"{fields.get('n_ctx')}",
            "Start a new chat.",
        )
    return ConfigError(f"llama.cpp's server refuses the request: {fields.get('message')}")
