"""An Ollama server, spoken to by the official client; what that lacks goes through the same connection."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kolotune.foundation.addresses import is_loopback
from kolotune.foundation.errors import OllamaDownError, OllamaError

from .modelfile import Description

_CONNECT_SECONDS = 10.0
_QUICK_SECONDS = 30.0
# The server writes a blob to disk before it answers, and loads a model before the first word of a chat.
_PATIENCE_SECONDS = 900.0
_CHUNK = 1 << 20
_GONE = 404


class OllamaClient:
    """One server.

    Args:
        host: where it listens, in any spelling that Ollama documents; None: OLLAMA_HOST, else this machine.
        patience: seconds of silence after which a long request is given up.

    Raises:
        OllamaError: the address is none.
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
                # 0.0.0.0 is where a server listens, not where it is found. A proxy can't reach this machine's loopback.
                address = address.copy_with(host=nearest) if nearest else address
                client = ollama.Client(str(address), timeout=timeout, trust_env=False)
        except (ValueError, httpx.InvalidURL) as error:
            raise OllamaError(f"this can't be the address of an Ollama server: {error}", "Mend OLLAMA_HOST.") from None
        self._api = client
        # The client has no call for versions and single blobs, and its `show` leaves the system prompt out.
        self._http = client._client
        self.url = str(address).rstrip("/")

    def version(self) -> str:
        """The server's version, as "0.17.1"; "" when it does not say."""
        with self._explained("asking for its version"):
            answer = self._http.get("/api/version", timeout=self._quick)
            self._check(answer)
            return str(_object(answer.json()).get("version", ""))

    def show(self, name: str) -> dict[str, Any] | None:
        """All that the server says about a model; None when it has none of that name."""
        with self._explained(f"asking for {name}"):
            answer = self._http.post("/api/show", json={"model": name}, timeout=self._quick)
            if answer.status_code == _GONE:
                return None
            self._check(answer)
            return _object(answer.json())

    def digest(self, name: str) -> str:
        """The digest of a model's manifest, as `ollama list` shows it; "" when the server lists no such model."""
        with self._explained("asking for its models"):
            for each in self._api.list().models:
                # Ollama keeps the case of a name and does not tell names apart by it.
                if (each.model or "").lower() in (name.lower(), f"{name}:latest".lower()):
                    return each.digest or ""
        return ""

    def has_blob(self, sha256: str) -> bool:
        """Whether the server has a file of that hash."""
        with self._explained("asking for a blob"):
            answer = self._http.head(f"/api/blobs/sha256:{sha256}", timeout=self._quick)
            if answer.status_code == _GONE:
                return False
            self._check(answer)
            return True

    def send_blob(self, path: Path, sha256: str, progress: Callable[[int], None]) -> None:
        """Sends a file, a piece at a time.

        Args:
            path: the file.
            sha256: its hash; the server computes its own and refuses another.
            progress: is told how many bytes have been sent.
        """
        size = path.stat().st_size
        with self._explained(f"sending {path.name}"), path.open("rb") as file:
            answer = self._http.post(
                f"/api/blobs/sha256:{sha256}",
                content=_pieces(file, progress),
                headers={"Content-Length": str(size), "Content-Type": "application/octet-stream"},
            )
            self._check(answer)

    def create(self, name: str, description: Description, files: Mapping[str, str]) -> Iterator[str]:
        """Makes a model of blobs that the server has; gives what the server says on the way.

        Args:
            name: of the model; one that is there is replaced.
            description: what is said about it; its FROM is not used.
            files: file name → SHA-256.

        Raises:
            OllamaError: the server fails, also in the middle of its answer, or stops before it is done.
        """
        last = ""
        with self._explained(f"making {name}"):
            for event in self._api.create(
                name,
                files={file: f"sha256:{sha256}" for file, sha256 in files.items()},
                template=description.template,
                license=list(description.licenses) or None,
                system=description.system,
                parameters=as_options(description) or None,
                messages=[{"role": role, "content": text} for role, text in description.messages] or None,
                stream=True,
            ):
                last = event.status or ""
                if last and last != "success":
                    yield last
        if last != "success":
            raise OllamaError(f"making {name}: the server stopped before it was done (it last said {last!r})")

    def delete(self, name: str) -> bool:
        """Deletes a model; False when there is none of that name."""
        import ollama

        with self._explained(f"deleting {name}"):
            try:
                self._api.delete(name)
            except ollama.ResponseError as error:
                if error.status_code == _GONE:
                    return False
                raise
        return True

    def chat(self, name: str, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> Iterator[str]:
        """The answer to a conversation, piece by piece.

        Args:
            name: of the model.
            messages: turns with `role` and `content`.
            options: parameters that win over the model's.

        Raises:
            OllamaError: there is no such model, or the server fails.
        """
        done = False
        with self._explained(f"talking to {name}"):
            for event in self._api.chat(name, list(messages), stream=True, options=dict(options) or None):
                done = bool(event.done)
                if event.message.content:
                    yield event.message.content
        if not done:
            raise OllamaError(f"talking to {name}: the answer broke off")

    def _check(self, answer: Any) -> None:
        import ollama

        if not answer.is_success:
            raise ollama.ResponseError(answer.text, answer.status_code)

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Turns whatever the client raises into the errors that kolotune expects."""
        import httpx
        import ollama
        import pydantic

        try:
            yield
        except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout) as error:
            why = f" ({error})" if isinstance(error, httpx.HTTPError) else ""
            raise OllamaDownError(f"there is no Ollama server at {self.url}{why}") from None
        except httpx.TimeoutException:
            raise OllamaError(f"{doing}: the Ollama server at {self.url} does not answer") from None
        except httpx.HTTPError as error:
            raise OllamaError(f"{doing}: the connection to {self.url} broke: {error}", "Try again.") from None
        except ollama.ResponseError as error:
            code = f" ({error.status_code})" if error.status_code > 0 else ""
            raise OllamaError(f"{doing}: the Ollama server says: {error.error or 'nothing'}{code}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, pydantic.ValidationError, TypeError, AttributeError):
            raise OllamaError(
                f"{doing}: what {self.url} answers is not what Ollama answers",
                "See what listens there; OLLAMA_HOST names another address.",
            ) from None


def as_options(description: Description) -> dict[str, Any]:
    """The parameters as Ollama's JSON has them: stops in one list."""
    options: dict[str, Any] = {}
    for name, value in description.parameters:
        if name == "stop":
            options.setdefault(name, []).append(value)
        else:
            options[name] = value
    return options


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, to be compared; empty for builds that have none (0.0.0)."""
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    numbers = tuple(int(part) for part in found.groups()) if found else ()
    return numbers if any(numbers) else ()


def _object(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise TypeError("no JSON object")
    return found


def _pieces(file: Any, progress: Callable[[int], None]) -> Iterator[bytes]:
    sent = 0
    while piece := file.read(_CHUNK):
        yield piece
        sent += len(piece)
        progress(sent)
