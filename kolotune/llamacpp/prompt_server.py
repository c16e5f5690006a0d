"""Ask llama.cpp's own server what it makes of a conversation: the text of the prompt, and its tokens.

The server is the one that Ollama and others run. Here it is a child process on the loopback interface, with a key that
only this process has. Its model has a tokenizer and a chat template, but no weights: it can render and tokenize, and
needs neither time nor memory to compute. It runs a stranger's template, so it has limits and may be lost.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, TemplateError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners import child_process, local

if TYPE_CHECKING:
    import httpx

_PROCESS = "kolotune.llamacpp.prompt_server_process"
_START_SECONDS = 120.0  # the largest vocabularies take 2 s of processor time
_CALL_SECONDS = 20.0  # the longest known template takes some milliseconds
_LOG_BYTES = 4000
# How llama.cpp's messages about a template begin, and how one ends.
_TEMPLATE_PROBLEM = re.compile(
    r"(?:common_chat_templates_init: error:|chat template parsing error:)(.*?)(?=\n\d+\.\d\d\.\d{3}\.|\nTraceback |\Z)",
    re.DOTALL,
)
_EXCEPTION = re.compile(r"^Error: (?:Jinja Exception: )?(.*)", re.MULTILINE)


@dataclass(frozen=True)
class SparseGguf:
    """A GGUF whose weights are all zeros.

    Attributes:
        header: everything before the data of the first tensor, padding included.
        size: bytes of the whole file.
    """

    header: bytes
    size: int


class PromptServer:
    """llama.cpp's server with the tokenizer and chat template of a GGUF. A context manager; not for several threads.

    Args:
        gguf: the model; see `tokenizer_model`.

    Raises:
        ToolchainError: xllamacpp is not installed, or can't be loaded.
        ArtifactError: llama.cpp can't load the model.
        TemplateError: it can't read the template, or the template takes too much.
    """

    def __init__(self, gguf: SparseGguf) -> None:
        self._open = contextlib.ExitStack()
        try:
            log = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed with the rest
            self._client = self._start(gguf, log)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server."""
        self._open.close()

    @property
    def address(self) -> str:
        """Where it listens."""
        return str(self._client.base_url).rstrip("/")

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        /,
        **variables: object,
    ) -> str:
        """Return the prompt that the server makes of a conversation, with the assistant's turn opened.

        A BOS that the tokenizer adds is not in it. An answer at the end of the messages is continued.

        Args:
            messages: the turns, each with ``role`` and ``content``, as chat templates get them.
            tools: tool definitions in the OpenAI format.
            variables: for the template (``chat_template_kwargs`` of a request); without them it gets what the server
                gives to every template.

        Raises:
            TemplateError: the server refuses the messages, or the template takes too much.
        """
        request: JsonObject = {"messages": [_as_request(message) for message in messages]}
        if tools:
            request["tools"] = list(tools)
        if variables:
            request["chat_template_kwargs"] = variables
        return str(self._call("/apply-template", request)["prompt"])

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a prompt: a BOS where the tokenizer adds one, and special tokens recognised."""
        request = {"content": text, "add_special": True, "parse_special": True}
        return typed_storage.convert(list[int], self._call("/tokenize", request)["tokens"])

    def _start(self, gguf: SparseGguf, log: IO[bytes]) -> httpx.Client:
        import httpx

        process = self._open.enter_context(local.piped(local.python(_PROCESS), {}, log))
        assert process.stdin is not None and process.stdout is not None
        key = secrets.token_urlsafe()
        watch = threading.Timer(_START_SECONDS, process.kill)
        watch.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended, and says why
                head = {"key": key, "header": len(gguf.header), "size": gguf.size}
                process.stdin.write(json.dumps(head).encode() + b"\n" + gguf.header)
                process.stdin.flush()
            address = _address(process.stdout, log)
        finally:
            watch.cancel()
        self._kill = process.kill
        headers = {"Authorization": f"Bearer {key}"}
        client = httpx.Client(base_url=address, headers=headers, trust_env=False, timeout=_CALL_SECONDS)
        return self._open.enter_context(client)

    def _call(self, path: str, request: Mapping[str, object]) -> JsonObject:
        import httpx

        try:
            answer = self._client.post(path, content=json.dumps(request).encode())
            fields = typed_storage.parse_object(answer.text)
        except httpx.TimeoutException:
            self._kill()
            reason = f"llama.cpp's server does not answer within {_CALL_SECONDS:.0f} s"
            raise TemplateError(f"the chat template can't be used: {reason}") from None
        except (httpx.HTTPError, typed_storage.StorageError):
            self._kill()
            raise TemplateError("the chat template can't be used: it ends llama.cpp's server") from None
        error = fields.get("error")
        if error is not None:
            message = str(error.get("message") if isinstance(error, dict) else error)
            raise TemplateError(f"llama.cpp's server refuses these messages: {_reason(message)}")
        return fields


def _address(events: IO[bytes], log: IO[bytes]) -> str:
    """Return the address in the child's first event.

    Raises:
        KolotuneError: the error that it reports.
        TemplateError, ArtifactError: it ended without one, because of the template or the tokenizer.
    """
    for line in events:
        event = child_process.event_in(line.decode("utf-8", "replace").strip())
        if event is None:
            continue
        name, fields = event
        if name == "error":
            raise child_process.error_in(fields, ArtifactError)
        return str(fields["address"])
    log.seek(0)
    said = log.read(_LOG_BYTES).decode("utf-8", "replace").strip()
    if not said:
        raise TemplateError("the chat template can't be used: it ends llama.cpp's server as it starts")
    if match := _TEMPLATE_PROBLEM.search(said):
        raise TemplateError(f"llama.cpp's server can't use the chat template: {_reason(match[1])}")
    raise ArtifactError(f"llama.cpp's server can't load the tokenizer: {said.splitlines()[0].partition(' E ')[2]}")


def _as_request(message: Mapping[str, object]) -> JsonObject:
    """Return a message as clients send it: arguments of tool calls are JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return dict(message)
    return {**message, "tool_calls": [_as_requested_call(call) for call in calls]}


def _as_requested_call(call: Mapping[str, object]) -> JsonObject:
    function = call.get("function", call)
    assert isinstance(function, Mapping)
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    sent: JsonObject = {"type": "function", "function": {"name": function.get("name"), "arguments": text}}
    return sent if call.get("id") is None else {**sent, "id": call["id"]}


def _reason(message: str) -> str:
    """Return what llama.cpp says of a template on one line: only what the template itself says, if it does."""
    if match := _EXCEPTION.search(message):
        message = match[1]
    return " ".join(message.split("\n...")[0].split())
