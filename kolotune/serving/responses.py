"""Errors in the form of OpenAI's API."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator

from kolotune.foundation import typed_storage
from kolotune.foundation.typed_storage import JsonObject
from kolotune.llamacpp.model_server import TOO_LONG

_TRANSLATED = ("message", "type", "code")


def error_body(
    message: str, kind: str = "invalid_request_error", code: str | None = None, **more: object
) -> JsonObject:
    """Return the body of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code, **more}}


def as_openais(body: bytes) -> JsonObject:
    """Return an error of llama.cpp's server in OpenAI's form, with what else it says, such as numbers of tokens."""
    try:
        error = typed_storage.parse_object(body).get("error")
    except typed_storage.StorageError:
        error = None
    if not isinstance(error, dict):
        return error_body(body.decode("utf-8", "replace"), "server_error")
    more = {name: value for name, value in error.items() if name not in _TRANSLATED}
    if error.get("type") == TOO_LONG:
        message = (
            f"the prompt has {error.get('n_prompt_tokens')} tokens; with its answer it may have {error.get('n_ctx')} "
            "(the Modelfile's num_ctx)"
        )
        return error_body(message, code="context_length_exceeded", **more)
    return error_body(str(error.get("message")), str(error.get("type")), **more)


def renamed_in(body: bytes, alias: str, name: str) -> bytes:
    """Return JSON of llama.cpp's server with a model's name in place of an alias; "" stands for no alias."""
    # In a text, the quotation marks would be escaped.
    return body.replace(_model(alias), _model(name)) if alias else body


async def renamed(pieces: AsyncGenerator[bytes, None], alias: str, name: str) -> AsyncGenerator[bytes, None]:
    """Yield a stream of events with a model's name in place of an alias."""
    async with contextlib.aclosing(pieces):
        rest = b""
        async for piece in pieces:
            lines, end, rest = (rest + piece).rpartition(b"\n") if alias else (piece, b"", b"")
            if lines or end:
                yield renamed_in(lines, alias, name) + end
        if rest:
            yield renamed_in(rest, alias, name)


def _model(name: str) -> bytes:
    return b'"model":' + json.dumps(name).encode()
