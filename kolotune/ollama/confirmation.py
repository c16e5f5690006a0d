"""Confirm that a model in Ollama is what was sent: compare it with the response of ``/api/show``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.typed_storage import JsonObject

from .modelfile import ModelDescription
from .parameters import as_options
from .prompt_path import NO_TEMPLATE, READS_JINJA, PromptPath, PromptRule, TemplateSources, Version, find_rule

_FROM = re.compile(r"^FROM .*sha256[-:]([0-9a-f]{64})\W*$", re.MULTILINE)

_CONTEXT = 4096  # Ollama's least, where nothing says otherwise
_LAST_FIELDS = ("general.quantization_version", "general.file_type")


@dataclass(frozen=True)
class Difference:
    """A part of a model that Ollama shows differently from what was sent.

    Attributes:
        part: weights, template, capabilities, system, license, messages, or the name of a parameter.
        shown, sent: the two values, where they are short.
    """

    part: str
    shown: str = ""
    sent: str = ""

    def __str__(self) -> str:
        return f"{self.part} {self.shown} instead of {self.sent}" if self.shown else f"the {self.part} differs"


@dataclass(frozen=True)
class SentModel:
    """A model as it is sent to a server, and what decides how it is rendered there.

    Attributes:
        description: the Modelfile's.
        sha256: of the GGUF.
        metadata: the GGUF's.
        version: the server's.
    """

    description: ModelDescription
    sha256: str
    metadata: Mapping[str, object]
    version: Version = ()

    @property
    def jinja(self) -> str:
        """The GGUF's chat template, or ""."""
        return str(self.metadata.get("tokenizer.chat_template", ""))

    @property
    def is_stored_as_sent(self) -> bool:
        """Whether the server keeps the bytes of the GGUF: it passes each through llama.cpp's writer."""
        older = bool(self.version) and self.version < READS_JINJA
        return older or tuple(self.metadata)[-2:] == _LAST_FIELDS

    @property
    def longest_prompt(self) -> int:
        """The most tokens that the server reads."""
        limits: list[object] = [value for name, value in self.description.parameters if name == "num_ctx"]
        limits.append(self.metadata.get(f"{self.metadata.get('general.architecture')}.context_length") or _CONTEXT)
        return min(_CONTEXT, *(limit for limit in limits if isinstance(limit, int) and limit > 0))

    def sources(self, known: str | None = None) -> TemplateSources:
        """Return what decides how it is rendered; `known` is a template that the server chose."""
        sent = self.description
        architecture = str(self.metadata.get("general.architecture", ""))
        return TemplateSources(architecture, self.jinja, sent.template, sent.renderer, sent.parser, known)

    def rule(self, shown: JsonObject) -> PromptRule | None:
        """Return how the server renders it, given what it shows; None where TEMPLATE is not understood."""
        template = str(shown.get("template", ""))
        # Without a TEMPLATE, a server may choose one that it knows: only it can say which.
        known = None if template in ("", NO_TEMPLATE, self.jinja) else template
        try:
            return find_rule(self.sources(known), self.version)
        except ArtifactError:
            return None


def find_differences(shown: JsonObject, sent: SentModel) -> list[Difference]:
    """Return the differences between what the server shows and what was sent.

    Args:
        shown: the response of ``/api/show``.
        sent: what the model was created from.
    """
    return list(_differences(shown, sent))


def _differences(shown: JsonObject, sent: SentModel) -> Iterator[Difference]:
    description, sha256 = sent.description, sent.sha256
    weights = _FROM.search(str(shown.get("modelfile", "")))  # this line comes before all texts of users
    if weights is None or (weights[1] != sha256 and sent.is_stored_as_sent):
        yield Difference("weights", weights[1][:12] if weights else "unnamed", sha256[:12])
    yield from _rendering_differences(shown, sent)
    if shown.get("system", "") != (description.system or ""):
        yield Difference("system")
    if shown.get("license", "") != "\n".join(description.licenses):
        yield Difference("license")
    if _messages(shown.get("messages")) != list(description.messages):
        yield Difference("messages")
    actual, expected = _parameters(str(shown.get("parameters", ""))), as_options(description.parameters)
    if "stop" not in expected:  # a server may set its own
        actual.pop("stop", None)
    for name in sorted({*actual, *expected}):
        if actual.get(name) != expected.get(name):
            yield Difference(name, str(actual.get(name, "unset")), str(expected.get(name, "unset")))


def _rendering_differences(shown: JsonObject, sent: SentModel) -> Iterator[Difference]:
    """The template in use and the capabilities, where Ollama's rule says which they are."""
    rule, template = sent.rule(shown), shown.get("template")
    if template is None:
        return
    if rule is None:
        if template not in (sent.description.template, sent.jinja):
            yield Difference("template")
        return
    if template != rule.template:
        names = {sent.jinja: "of the GGUF", sent.description.template: "of the Modelfile"}
        actual = names.get(str(template), "")
        yield Difference("template", actual, names.get(rule.template, "") if actual else "")
    elif "capabilities" in shown and rule.path is not PromptPath.RENDERER:
        capabilities = shown["capabilities"]
        named = set(map(str, capabilities)) if isinstance(capabilities, list) else set()
        if named != set(rule.capabilities):
            yield Difference("capabilities", ", ".join(sorted(named)), ", ".join(sorted(rule.capabilities)))


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
