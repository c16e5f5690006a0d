"""Whether a model in Ollama is what was sent: the answer of ``/api/show``, held against it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .client import as_options
from .modelfile import Description

_FROM = re.compile(r"^FROM .*sha256[-:]([0-9a-f]{64})\W*$", re.MULTILINE)


def differences(shown: Mapping[str, Any], sent: Description, sha256: str) -> list[str]:
    """What the server shows otherwise than it was sent, a sentence each; empty when all is the same.

    Args:
        shown: the answer of ``/api/show``.
        sent: what the model was made with. Without a template Ollama chooses one, and that is no difference.
        sha256: of the GGUF.
    """
    return list(_differences(shown, sent, sha256))


def _differences(shown: Mapping[str, Any], sent: Description, sha256: str) -> Iterator[str]:
    weights = _FROM.search(str(shown.get("modelfile", "")))  # it comes before all texts of users
    if weights is None or weights[1] != sha256:
        yield f"the weights are {weights[1][:12] if weights else 'not named'}, not {sha256[:12]}"
    if sent.template is not None and shown.get("template", "") != sent.template:
        yield "the template is another"
    if shown.get("system", "") != (sent.system or ""):
        yield "the system prompt is another"
    if shown.get("license", "") != "\n".join(sent.licenses):
        yield "the license is another"
    messages = [(str(each.get("role")), str(each.get("content"))) for each in shown.get("messages") or []]
    if messages != list(sent.messages):
        yield "the messages are others"
    there, wanted = _parameters(str(shown.get("parameters", ""))), as_options(sent)
    for name in sorted({*there, *wanted}):
        if there.get(name) != wanted.get(name):
            yield f"{name} is {there.get(name, 'not set')}, not {wanted.get(name, 'unset')}"


def _parameters(text: str) -> dict[str, Any]:
    """The parameters in the text that ``/api/show`` makes of them: a name and a value, as Go prints it, a line."""
    found: dict[str, Any] = {}
    for line in text.split("\n"):
        name, _, value = line.partition(" ")
        if name:
            read = _value(value.strip())
            if name == "stop":
                found.setdefault(name, []).append(read)
            else:
                found[name] = read
    return found


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)  # Go's quoted texts and numbers read the same in Python
    except (ValueError, SyntaxError):
        return text
