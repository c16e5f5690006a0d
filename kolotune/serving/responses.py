"""The bodies of responses, in the format of OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from kolotune.foundation.typed_storage import JsonObject


@dataclass(frozen=True)
class CompletionBodies:
    """The bodies of one chat completion.

    Attributes:
        identity: the completion's id.
        model: the name of the model.
    """

    identity: str
    model: str

    def whole(self, text: str, reason: str, usage: Mapping[str, int]) -> JsonObject:
        """Return the body of an answer that is not streamed."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": dict(usage)}

    def chunk(self, delta: Mapping[str, str], reason: str | None = None) -> JsonObject:
        """Return the body of a chunk of a streamed answer."""
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, usage: Mapping[str, int]) -> JsonObject:
        """Return the last body of a stream that includes usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": dict(usage)}

    def _head(self, kind: str) -> JsonObject:
        return {"id": self.identity, "object": kind, "created": int(time.time()), "model": self.model}


def usage_of(prompt: int, answer: int) -> dict[str, int]:
    """Return the counts of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> JsonObject:
    """Return the body of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
