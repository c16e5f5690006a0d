"""The requests of OpenAI's chat completions that are accepted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le, MinLen

from kolotune.foundation.typed_storage import JsonObject

# A response that ignored these would not be what the request asks for.
_UNSUPPORTED = ("tools", "functions", "logprobs", "logit_bias", "audio", "prediction", "web_search_options")


class BadRequest(Exception):
    """A request that can't be answered; its text says why, `code` is OpenAI's code for the reason."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class TextPart:
    """A part of a message's text."""

    type: Literal["text"]
    text: str


@dataclass(frozen=True)
class RequestMessage:
    """One turn; `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def as_turn(self) -> dict[str, str]:
        """Return the turn as chat templates accept it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


@dataclass(frozen=True)
class StreamOptions:
    """What a stream contains besides the answer."""

    include_usage: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """A request for a chat completion; where a value is None, the Modelfile's or kolotune's default applies."""

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
    chat_template_kwargs: dict[str, object] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)

    @property
    def longest(self) -> int | None:
        """The greatest length of the answer, in tokens."""
        return self.max_completion_tokens or self.max_tokens


def read_request(body: bytes) -> ChatRequest:
    """Parse the body of a request.

    Raises:
        BadRequest: it is invalid, or asks for something that is not supported.
    """
    import pydantic

    try:
        request = pydantic.TypeAdapter(ChatRequest).validate_json(body)
        fields = pydantic.TypeAdapter(JsonObject).validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{location}: {first['msg']}" if location else str(first["msg"])) from None
    unsupported = [name for name in _UNSUPPORTED if fields.get(name)]
    response_format = fields.get("response_format")
    if response_format and (not isinstance(response_format, dict) or response_format.get("type") != "text"):
        unsupported.append("response_format")
    if unsupported:
        raise BadRequest(f"{', '.join(unsupported)}: not supported")
    return request
