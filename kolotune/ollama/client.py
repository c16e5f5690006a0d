"""Talk to an Ollama server with the official client, and over its connection for what that lacks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from kolotune.foundation import typed_storage
from kolotune.foundation.addresses import is_loopback
from kolotune.foundation.errors import OllamaDownError, OllamaError
from kolotune.foundation.typed_storage import JsonObject

from .modelfile import ModelDescription
from .parameters import Options, as_options

if TYPE_CHECKING:
    import httpx

_CONNECT_SECONDS = 10.0
_QUICK_SECONDS = 30.0
# The server writes a blob to disk before it responds, and loads a model before the first word of a chat.
_PATIENCE_SECONDS = 900.0
_CHUNK = 1 << 20
_NOT_FOUND = 404


@dataclass(frozen=True)
class RenderedPrompt:
    """The answer to a request for a prompt.

    Attributes:
        text: the prompt; None where the server can't show it.
        refusal: why the server does not accept the conversation, or "".
    """

    text: str | None = None
    refusal: str = ""


class OllamaClient:
    """The connection to one server.

    Args:
        host: its address, in any notation that Ollama documents; None: OLLAMA_HOST, else this machine.
        patience: seconds without data after which a long request fails.

    Attributes:
        url: the address.

    Raises:
        OllamaError: the address is invalid.
    """

    def __init__(self, host: str | None = None, patience: float = _PATIENCE_SECONDS) -> None:
        import httpx
        import ollama

        timeout = httpx.Timeout(patience, connect=_CONNECT_SECONDS)
        self._quick = httpx.Timeout(min(patience, _QUICK_SECONDS), connect=_CONNECT_SECONDS)
        try:
            client = ollama.Client(host, timeout=timeout)
            address = client._client.base_url
            nearest = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host)
            if nearest or is_loopback(address.host):
                # A server listens at 0.0.0.0, but can't be reached there. A proxy can't reach this machine's loopback.
                address = address.copy_with(host=nearest) if nearest else address
                client = ollama.Client(str(address), timeout=timeout, trust_env=False)
        except (ValueError, httpx.InvalidURL) as error:
            raise OllamaError(f"invalid address of an Ollama server: {error}", "Correct OLLAMA_HOST.") from None
        self._api = client
        # The client has no calls for the version and for single blobs, and its `show` leaves out the system prompt.
        self._http = client._client
        self.url = str(address).rstrip("/")

    def version(self) -> str:
        """Return the server's version, as "0.17.1"; "" when it does not report one."""
        with self._translate_errors("asking for its version"):
            response = self._http.get("/api/version", timeout=self._quick)
            self._check(response)
            return str(_object(response.json()).get("version", ""))

    def show(self, name: str) -> JsonObject | None:
        """Return all that the server reports about a model; None when there is no model of that name."""
        with self._translate_errors(f"asking for {name}"):
            response = self._http.post("/api/show", json={"model": name}, timeout=self._quick)
            if response.status_code == _NOT_FOUND:
                return None
            self._check(response)
            return _object(response.json())

    def digest(self, name: str) -> str:
        """Return the digest of a model's manifest, as `ollama list` shows it; "" when there is no such model."""
        with self._translate_errors("asking for its models"):
            for model in self._api.list().models:
                # Ollama keeps the case of a name, but ignores it when it looks a name up.
                if (model.model or "").lower() in (name.lower(), f"{name}:latest".lower()):
                    return model.digest or ""
        return ""

    def has_blob(self, sha256: str) -> bool:
        """Return whether the server has a file with that hash."""
        with self._translate_errors("asking for a blob"):
            response = self._http.head(f"/api/blobs/sha256:{sha256}", timeout=self._quick)
            if response.status_code == _NOT_FOUND:
                return False
            self._check(response)
            return True

    def send_blob(self, path: Path, sha256: str, progress: Callable[[int], None]) -> None:
        """Send a file in pieces.

        Args:
            path: the file.
            sha256: its hash; the server computes it too and refuses a different one.
            progress: called with the number of bytes sent so far.
        """
        size = path.stat().st_size
        with self._translate_errors(f"sending {path.name}"), path.open("rb") as file:
            response = self._http.post(
                f"/api/blobs/sha256:{sha256}",
                content=_pieces(file, progress),
                headers={"Content-Length": str(size), "Content-Type": "application/octet-stream"},
            )
            self._check(response)

    def create(self, name: str, description: ModelDescription, files: Mapping[str, str]) -> Iterator[str]:
        """Create a model from blobs that the server has; yield the status messages of the server.

        Args:
            name: of the model; an existing one is replaced.
            description: its template, system prompt, parameters and so on; FROM is not used.
            files: file name → SHA-256.

        Raises:
            OllamaError: the server fails, or stops before it has finished.
        """
        request: JsonObject = {
            "model": name,
            "files": {file: f"sha256:{sha256}" for file, sha256 in files.items()},
            "template": description.template,
            "system": description.system,
            "renderer": description.renderer,
            "parser": description.parser,
            "license": list(description.licenses),
            "parameters": as_options(description.parameters),
            "messages": [{"role": role, "content": text} for role, text in description.messages],
        }
        last = ""
        with self._translate_errors(f"creating {name}"):
            for event in self._events("/api/create", {key: value for key, value in request.items() if value}):
                last = str(event.get("status") or "")
                if last and last != "success":
                    yield last
        if last != "success":
            raise OllamaError(
                f"creating {name}: the server stopped before it had finished (its last status was {last!r})"
            )

    def delete(self, name: str) -> bool:
        """Delete a model; return False when there is no model of that name."""
        import ollama

        with self._translate_errors(f"deleting {name}"):
            try:
                self._api.delete(name)
            except ollama.ResponseError as error:
                if error.status_code == _NOT_FOUND:
                    return False
                raise
        return True

    def chat(self, name: str, messages: Sequence[Mapping[str, str]], options: Options) -> Iterator[str]:
        """Yield the answer to a conversation in pieces.

        Args:
            name: of the model.
            messages: turns with `role` and `content`.
            options: parameters that override the model's.

        Raises:
            OllamaError: there is no such model, or the server fails.
        """
        done = False
        with self._translate_errors(f"talking to {name}"):
            for event in self._api.chat(name, list(messages), stream=True, options=dict(options) or None):
                done = bool(event.done)
                if event.message.content:
                    yield event.message.content
        if not done:
            raise OllamaError(f"talking to {name}: the answer was interrupted")

    def render(
        self,
        name: str,
        messages: Iterable[JsonObject],
        tools: Sequence[Mapping[str, object]] = (),
        think: bool | None = None,
    ) -> RenderedPrompt:
        """Ask for the prompt that a model gets for a conversation; nothing is generated.

        Args:
            name: of the model.
            messages: turns as in Ollama's API.
            tools: definitions in the OpenAI format.
            think: whether to think; None to say nothing.

        Raises:
            OllamaError: there is no such model, or the server fails.
        """
        import httpx

        # An older server generates an answer.
        request = _one_token(name, messages, think) | {"_debug_render_only": True}
        with self._translate_errors(f"asking for prompts of {name}"):
            response = self._http.post("/api/chat", json=request | ({"tools": list(tools)} if tools else {}))
            if response.status_code == httpx.codes.BAD_REQUEST:
                return RenderedPrompt(refusal=str(_object(response.json()).get("error") or response.text))
            self._check(response)
            debug = _object(response.json()).get("_debug_info")
            text = debug.get("rendered_template") if isinstance(debug, dict) else None
            return RenderedPrompt(text if isinstance(text, str) else None)

    def count_tokens(self, name: str, messages: Iterable[JsonObject], think: bool | None = None) -> int | None:
        """Return how many tokens a model reads for a conversation; None when the server does not say.

        Raises:
            OllamaError: there is no such model, or the server fails.
        """
        request = _one_token(name, messages, think)
        with self._translate_errors(f"counting tokens of {name}"):
            response = self._http.post("/api/chat", json=request)
            self._check(response)
            count = _object(response.json()).get("prompt_eval_count")
            return count if isinstance(count, int) else None

    def _events(self, path: str, request: JsonObject) -> Iterator[JsonObject]:
        """Yield the objects of a stream; an error in it is raised."""
        import ollama

        with self._http.stream("POST", path, json=request) as response:
            if not response.is_success:
                response.read()
                self._check(response)
            for line in response.iter_lines():
                event = typed_storage.parse_object(line)
                if error := event.get("error"):
                    raise ollama.ResponseError(str(error))
                yield event

    def _check(self, response: httpx.Response) -> None:
        import ollama

        if not response.is_success:
            raise ollama.ResponseError(response.text, response.status_code)

    @contextlib.contextmanager
    def _translate_errors(self, doing: str) -> Iterator[None]:
        """Raise the errors of the client as errors of the tree."""
        import httpx
        import ollama
        import pydantic

        try:
            yield
        except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout) as error:
            reason = f" ({error})" if isinstance(error, httpx.HTTPError) else ""
            raise OllamaDownError(f"there is no Ollama server at {self.url}{reason}") from None
        except httpx.TimeoutException:
            raise OllamaError(f"{doing}: the Ollama server at {self.url} does not respond") from None
        except httpx.HTTPError as error:
            raise OllamaError(f"{doing}: the connection to {self.url} was lost: {error}", "Try again.") from None
        except ollama.ResponseError as error:
            code = f" ({error.status_code})" if error.status_code > 0 else ""
            raise OllamaError(f"{doing}: the Ollama server says: {error.error or 'nothing'}{code}") from None
        except (
            json.JSONDecodeError, UnicodeDecodeError, pydantic.ValidationError, typed_storage.StorageError, TypeError,
            AttributeError,
        ):  # fmt: skip
            raise OllamaError(
                f"{doing}: {self.url} does not respond as Ollama does",
                "Check what listens there; OLLAMA_HOST sets the address.",
            ) from None


def _one_token(name: str, messages: Iterable[JsonObject], think: bool | None) -> JsonObject:
    """Return a request for one token of an answer."""
    request: JsonObject = {
        "model": name,
        "messages": list(messages),
        "stream": False,
        "options": {"num_predict": 1},
    }
    return request if think is None else {**request, "think": think}


def _object(value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise TypeError("not a JSON object")
    return value


def _pieces(file: IO[bytes], progress: Callable[[int], None]) -> Iterator[bytes]:
    sent = 0
    while piece := file.read(_CHUNK):
        yield piece
        sent += len(piece)
        progress(sent)
