"""Ask llama.cpp's own server what it makes of a conversation: the text of the prompt, and its tokens.

The server is the one that Ollama and others run. Here it is a child process on the loopback interface, with a key that
only this process has. Its model has a tokenizer and a chat template, but no weights: it can render and tokenize, and
needs neither time nor memory to compute. It runs a stranger's template, so it has limits and may be lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kolotune.foundation import typed_storage
from kolotune.foundation.closing import Closing
from kolotune.foundation.errors import ArtifactError, KolotuneError, TemplateError, ToolchainError
from kolotune.foundation.typed_storage import JsonObject

from .child_server import ChildServer

_PROCESS = "kolotune.llamacpp.prompt_server_process"
_START_SECONDS = 120.0  # the largest vocabularies take 2 s of processor time
_CALL_SECONDS = 20.0  # the longest known template takes some milliseconds
# How llama.cpp's messages about a template begin, and how one ends.
_TEMPLATE_PROBLEM = re.compile(
    r"(?:common_chat_templates_init: error:|chat template parsing error:)(.*?)(?=\n\d+\.\d\d\.\d{3}\.|\nTraceback |\Z)",
    re.DOTALL,
)
_MOST_CHARACTERS = 200_000  # of texts in one request, which takes a fifth of a second
_BETWEEN = -1
_OUT_OF_MEMORY = "std::bad_alloc"
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


class PromptServer(Closing):
    """llama.cpp's server with the tokenizer and chat template of a GGUF. A context manager; not for several threads.

    Args:
        gguf: the model; see `tokenizer_model`.

    Raises:
        ToolchainError: xllamacpp is not installed, or can't be loaded.
        ArtifactError: llama.cpp can't load the model.
        TemplateError: it can't read the template, or the template takes too much.
    """

    def __init__(self, gguf: SparseGguf) -> None:
        import httpx

        task = {"header": len(gguf.header), "size": gguf.size}
        self._server = ChildServer(_PROCESS, task, gguf.header, seconds=_START_SECONDS, explain=_explained)
        self._client = httpx.Client(
            base_url=self._server.address, headers=self._server.headers, trust_env=False, timeout=_CALL_SECONDS
        )

    def close(self) -> None:
        """End the server."""
        self._client.close()
        self._server.close()

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._server.address

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

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, which is a part of a prompt: no BOS, and special tokens are plain text."""
        split: list[list[int]] = []
        for some in _batches(texts):
            # Numbers among the texts come back as they are: this one, which no token has, ends each text.
            content = [part for text in some for part in (text, _BETWEEN)]
            request = {"content": content, "add_special": False, "parse_special": False}
            tokens = typed_storage.convert(list[int], self._call("/tokenize", request)["tokens"])
            ends = [at for at, token in enumerate(tokens) if token == _BETWEEN]
            if len(ends) != len(some):
                raise ToolchainError("llama.cpp's server splits texts in another way than is known of it")
            split += [tokens[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]
        return split

    def _call(self, path: str, request: Mapping[str, object]) -> JsonObject:
        import httpx

        try:
            answer = self._client.post(path, content=json.dumps(request).encode())
            fields = typed_storage.parse_object(answer.text)
        except httpx.TimeoutException:
            self._server.kill()
            reason = f"llama.cpp's server does not answer within {_CALL_SECONDS:.0f} s"
            raise TemplateError(f"the chat template can't be used: {reason}") from None
        except (httpx.HTTPError, typed_storage.StorageError):
            self._server.kill()
            raise TemplateError("the chat template can't be used: it ends llama.cpp's server") from None
        error = fields.get("error")
        if error is not None:
            message = str(error.get("message") if isinstance(error, dict) else error)
            if _OUT_OF_MEMORY in message:  # and may be out of order
                self._server.kill()
                raise TemplateError("the chat template can't be used: it takes too much memory")
            raise TemplateError(f"llama.cpp's server refuses these messages: {_reason(message)}")
        return fields


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= _MOST_CHARACTERS:
            yield some
            some, size = [], 0
    if some:
        yield some


def _explained(said: str) -> KolotuneError:
    """Return what ended the child as it started: the template or the tokenizer."""
    if not said:
        return TemplateError("the chat template can't be used: it ends llama.cpp's server as it starts")
    if match := _TEMPLATE_PROBLEM.search(said):
        return TemplateError(f"llama.cpp's server can't use the chat template: {_reason(match[1])}")
    return ArtifactError(f"llama.cpp's server can't load the tokenizer: {said.splitlines()[0].partition(' E ')[2]}")


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
