"""What a program may ask for, and the shapes of the answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

# Asked for in vain: an answer without them would be another than was wanted.
_MISSING = ("tools", "functions", "logprobs", "logit_bias", "audio", "prediction", "web_search_options")


class BadRequest(Exception):
    """The request can't be met; its text says why."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class TextPart:
    """A part of a text."""

    type: Literal["text"]
    text: str


@dataclass(frozen=True)
class RequestMessage:
    """One turn; `developer` is the newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """The turn as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


@dataclass(frozen=True)
class StreamOptions:
    """What else a stream carries."""

    include_usage: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """A request for a chat completion; None: the Modelfile's value, or ours."""

    messages: Annotated[list[RequestMessage], MinLen(1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Ge(0)] | None = None
    top_p: Annotated[float, Ge(0), Le(1)] | None = None
    frequency_penalty: Annotated[float, Ge(-2), Le(2)] | None = None
    presence_penalty: Annotated[float, Ge(-2), Le(2)] | None = None
    max_tokens: Annotated[int, Ge(1)] | None = None
    max_completion_tokens: Annotated[int, Ge(1)] | None = None
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Ge(1), Le(1)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)

    @property
    def longest(self) -> int | None:
        """The longest answer wanted, in tokens."""
        return self.max_completion_tokens or self.max_tokens


def read(body: bytes) -> ChatRequest:
    """The request in a body.

    Raises:
        BadRequest: it is none, or asks for what is not offered here.
    """
    import pydantic

    try:
        found = pydantic.TypeAdapter(ChatRequest).validate_json(body)
        extra = pydantic.TypeAdapter(dict[str, Any]).validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{where}: {first['msg']}" if where else str(first["msg"])) from None
    asked = [name for name in _MISSING if extra.get(name)]
    wanted = extra.get("response_format")
    if wanted and (not isinstance(wanted, dict) or wanted.get("type") != "text"):
        asked.append("response_format")
    if asked:
        raise BadRequest(f"{', '.join(asked)}: not offered here")
    return found


@dataclass(frozen=True)
class CompletionBodies:
    """Makes the answers to one request."""

    identity: str
    model: str

    def whole(self, text: str, reason: str, usage: Mapping[str, int]) -> dict[str, Any]:
        """The answer in one piece."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": dict(usage)}

    def piece(self, delta: Mapping[str, str], reason: str | None = None) -> dict[str, Any]:
        """A part of a streamed answer."""
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def count(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The last part of a stream that was asked for usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": dict(usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": int(time.time()), "model": self.model}


def usage_of(prompt: int, answer: int) -> dict[str, int]:
    """The counts of tokens as OpenAI names them."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def error_of(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
