"""What a request says, and what the Modelfile says where the request does not: as Ollama applies it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kolotune.foundation.config import DEFAULT_TEMPERATURE
from kolotune.foundation.typed_storage import JsonObject
from kolotune.ollama.modelfile import ModelDescription
from kolotune.ollama.parameters import as_options

from .request_fields import NOT_SUPPORTED, unused_fields

CHAT, COMPLETION, _EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_PROMPT_OF_CHAT = "/apply-template"
PATHS = (CHAT, COMPLETION, _EMBEDDINGS, _PROMPT_OF_CHAT, "/tokenize", "/detokenize")
"""What llama.cpp's server is asked for."""
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "repeat_last_n", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
_LONGEST = ("max_completion_tokens", "max_tokens", "n_predict")
_LOADING = ("num_ctx", "num_batch", "num_gpu", "num_thread")
_USED = frozenset({*_SAMPLING, *_LOADING, "stop", "seed", "num_predict"})
_ROLES = ("system", "developer", "user", "assistant", "tool")


class BadRequest(Exception):
    """A request that can't be answered; its text says why, `code` is OpenAI's code for the reason."""

    def __init__(self, message: str, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.code, self.status = code, status


@dataclass(frozen=True)
class Defaults:
    """What applies where a request says nothing.

    Attributes:
        description: the Modelfile.
        end_texts: what ends every answer.
        takes_tools: whether the template has a place for tools.
        switches: variables of the trained template that a request may set; false where it does not.
        adapters: how strong each of the server's adapters is in an answer; () for a server without any.
    """

    description: ModelDescription
    end_texts: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    takes_tools: bool = True
    adapters: tuple[float, ...] = ()

    @property
    def unused(self) -> list[str]:
        """The parameters of the Modelfile that apply only in Ollama."""
        return sorted(set(as_options(self.description.parameters)) - _USED)

    def number(self, name: str) -> float | None:
        """Return the Modelfile's value of a parameter; None where it does not set it."""
        value = as_options(self.description.parameters).get(name)
        return value if isinstance(value, int | float) else None

    def apply(self, path: str, request: Mapping[str, object]) -> tuple[JsonObject, list[str]]:
        """Return a request as llama.cpp's server gets it, and the fields of it that have no effect.

        Args:
            path: one of `PATHS`.
            request: its JSON object.

        Raises:
            BadRequest: it is not one that can be answered.
        """
        unused = unused_fields(path, request)
        whole: JsonObject = {name: value for name, value in request.items() if value is not None}
        if path in (CHAT, _PROMPT_OF_CHAT):
            whole["messages"] = self._turns(request.get("messages"))
            whole["chat_template_kwargs"] = self._variables(request, unused)
        if path in (CHAT, COMPLETION):
            if wanted := [name for name in NOT_SUPPORTED if request.get(name)]:
                raise BadRequest(f"{', '.join(wanted)}: not supported{NOT_SUPPORTED[wanted[0]]}")
            if request.get("tools") and not self.takes_tools:
                raise BadRequest("tools: not supported by the model's chat template")
            whole |= self._sampling(whole)
            whole["stop"] = self._stops(request.get("stop"))
            if self.adapters:
                whole["lora"] = [{"id": number, "scale": scale} for number, scale in enumerate(self.adapters)]
        if path == _EMBEDDINGS and self.adapters:
            raise BadRequest("embeddings: not supported for runs that share their base model (--share-base)")
        return whole, unused

    def _turns(self, messages: object) -> list[object]:
        """The Modelfile's system prompt and turns, then the request's."""
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages: must be a list of at least one message")
        for number, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            if role not in _ROLES:
                raise BadRequest(f"messages.{number}.role: must be one of {', '.join(_ROLES)}")
        before = [{"role": role, "content": text} for role, text in self.description.messages]
        if self.description.system and messages[0]["role"] not in ("system", "developer"):
            before.insert(0, {"role": "system", "content": self.description.system})
        return [*before, *messages]

    def _variables(self, request: Mapping[str, object], unused: list[str]) -> JsonObject:
        """The variables for the template: the trained one reads its switches only, all of them or none."""
        given = request.get("chat_template_kwargs") or {}
        if not isinstance(given, Mapping):
            raise BadRequest("chat_template_kwargs: must be an object")
        unused += [f"chat_template_kwargs.{name}" for name in given if name not in self.switches]
        thinks = any(given.get(name) for name in self.switches)
        return {**given, **dict.fromkeys(self.switches, thinks)}

    def _sampling(self, request: Collection[str]) -> JsonObject:
        """The Modelfile's values, else those of `chat`, for what the request does not set."""
        values: JsonObject = {"temperature": DEFAULT_TEMPERATURE}
        for name in (*_SAMPLING, "seed"):
            if (value := self.number(name)) is not None:
                values[name] = value
        longest = self.number("num_predict")
        if longest is not None and longest > 0 and not any(name in request for name in _LONGEST):
            values["max_tokens"] = int(longest)
        return {name: value for name, value in values.items() if name not in request}

    def _stops(self, given: object) -> list[str]:
        own = as_options(self.description.parameters).get("stop", [])
        asked: Sequence[object] = [given] if isinstance(given, str) else given if isinstance(given, list) else []
        stops = [*(own if isinstance(own, list) else []), *self.end_texts, *asked]
        return list(dict.fromkeys(stop for stop in map(str, stops) if stop))
