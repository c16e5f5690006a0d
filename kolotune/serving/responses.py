"""Errors in the form of OpenAI's API."""

from __future__ import annotations

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
