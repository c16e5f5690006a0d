"""Confirm that a model in Ollama is what was sent: compare it with the response of ``/api/show``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kolotune.foundation.typed_storage import JsonObject

from .modelfile import ModelDescription
from .parameters import as_options

_FROM = re.compile(r"^FROM .*sha256[-:]([0-9a-f]{64})\W*$", re.MULTILINE)


@dataclass(frozen=True)
class Difference:
    """A part of a model that Ollama shows differently from what was sent.

    Attributes:
        part: weights, template, system, license, messages, or the name of a parameter.
        shown, sent: the two values, where they are short.
    """

    part: str
    shown: str = ""
    sent: str = ""

    def __str__(self) -> str:
        return f"{self.part} {self.shown} instead of {self.sent}" if self.shown else f"the {self.part} differs"


def find_differences(shown: JsonObject, sent: ModelDescription, sha256: str) -> list[Difference]:
    """Return the differences between what the server shows and what was sent.

    Args:
        shown: the response of ``/api/show``.
        sent: the description that the model was created from. Without a template Ollama chooses one: no difference.
        sha256: of the GGUF.
    """
    return list(_differences(shown, sent, sha256))


def _differences(shown: JsonObject, sent: ModelDescription, sha256: str) -> Iterator[Difference]:
    weights = _FROM.search(str(shown.get("modelfile", "")))  # this line comes before all texts of users
    if weights is None or weights[1] != sha256:
        yield Difference("weights", weights[1][:12] if weights else "unnamed", sha256[:12])
    if sent.template is not None and shown.get("template", "") != sent.template:
        yield Difference("template")
    if shown.get("system", "") != (sent.system or ""):
        yield Difference("system")
    if shown.get("license", "") != "\n".join(sent.licenses):
        yield Difference("license")
    if _messages(shown.get("messages")) != list(sent.messages):
        yield Difference("messages")
    actual, expected = _parameters(str(shown.get("parameters", ""))), as_options(sent.parameters)
    for name in sorted({*actual, *expected}):
        if actual.get(name) != expected.get(name):
            yield Difference(name, str(actual.get(name, "unset")), str(expected.get(name, "unset")))


def _messages(shown: object) -> list[tuple[str, str]]:
    messages = shown if isinstance(shown, list) else []
    return [(str(turn.get("role")), str(turn.get("content"))) for turn in messages]


def _parameters(text: str) -> JsonObject:
    """Parse the parameters in ``/api/show``: a name and a value, as Go prints it, in each line."""
    parameters: JsonObject = {}
    stops: list[object] = []
    for line in text.split("\n"):
        name, _, value = line.partition(" ")
        if name == "stop":
            stops.append(_value(value.strip()))
        elif name:
            parameters[name] = _value(value.strip())
    return parameters | {"stop": stops} if stops else parameters


def _value(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    try:
        value: object = ast.literal_eval(text)  # Python reads Go's quoted texts and numbers
    except (ValueError, SyntaxError):
        return text
    return value
