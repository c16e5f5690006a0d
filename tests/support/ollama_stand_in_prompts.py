"""How the stand-in for Ollama renders prompts: by Go's text/template, or by llama.cpp's own server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kolotune.chats.served_form import tool_as_read
from kolotune.foundation.errors import TemplateError
from kolotune.llamacpp.prompt_server import PromptServer
from kolotune.llamacpp.tokenizer_model import read_tokenizer_model
from kolotune.ollama.compatibility import release_numbers
from kolotune.ollama.prompt_path import PromptPath, PromptRule, TemplateSources, find_rule, own_rendering
from kolotune.weights.gguf_metadata import read_metadata
from support import llamacpp_messages
from support.go_templates import Renderer
from support.observed import GGUF_TEMPLATES, KNOWN_CHATML

Messages = list[dict[str, Any]]
# Ollama takes one of its 37 known templates, at an edit distance below 100. The stand-in knows one, of our own, and
# distinguishes the observed templates at this distance.
_KNOWN, _NEAR = GGUF_TEMPLATES["plain"], 60
_UNUSABLE = "Unable to generate parser for this template. Automatic parser generation failed: \n------------\n"


class Refused(Exception):
    """Ends a request with a status and an error in Ollama's format."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status, self.error = status, error


@dataclass
class StoredModel:
    """A model of the stand-in.

    Attributes:
        name: with its tag.
        digest: of its weights, as they are stored.
        template, known: the TEMPLATE that was sent, and the one that was chosen for the GGUF's template.
        system, licenses, parameters, messages, renderer, parser: as they were sent, or set by the server itself.
        modified: when it was created.
    """

    name: str
    digest: str
    template: str = ""
    known: str | None = None
    system: str = ""
    licenses: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: Messages = field(default_factory=list)
    renderer: str = ""
    parser: str = ""
    modified: str = ""


def known_template(jinja: str) -> str | None:
    """Return the TEMPLATE that the server knows for a GGUF's template; None for an unknown one."""
    return KNOWN_CHATML if jinja and _distance(jinja, _KNOWN) < _NEAR else None


def _distance(one: str, other: str) -> int:
    """The edit distance; what is too far anyway is not computed."""
    if abs(len(one) - len(other)) >= _NEAR:
        return _NEAR
    row = list(range(len(other) + 1))
    for number, character in enumerate(one, 1):
        last, row[0] = row[0], number
        for position, wanted in enumerate(other, 1):
            last, row[position] = (
                row[position],
                min(row[position] + 1, row[position - 1] + 1, last + (character != wanted)),
            )
    return row[-1]


class PromptRenderer:
    """Renders the prompts of stored models.

    Args:
        go: renders Go templates; None: such prompts are refused.
        version: the server's.
    """

    def __init__(self, go: Renderer | None, version: str) -> None:
        self._go = go
        self.version = release_numbers(version)
        self._servers: dict[Path, PromptServer] = {}

    def close(self) -> None:
        while self._servers:
            self._servers.popitem()[1].close()

    def sources(self, model: StoredModel, gguf: Path) -> TemplateSources:
        metadata = read_metadata(gguf)
        return TemplateSources(
            str(metadata["general.architecture"]),
            str(metadata.get("tokenizer.chat_template", "")),
            model.template or None,
            model.renderer or None,
            model.parser or None,
            model.known,
        )

    def rule(self, model: StoredModel, gguf: Path, forced: bool = False) -> PromptRule:
        """Return how a model is rendered; `forced`: the server's environment asks for TEMPLATE."""
        sources = self.sources(model, gguf)
        rule = find_rule(sources, self.version)
        if forced and sources.template and rule.path is PromptPath.JINJA:
            return find_rule(TemplateSources(sources.architecture, "", sources.template), self.version)
        return rule

    def set_by_architecture(self, model: StoredModel, gguf: Path) -> None:
        """Set what the server sets by itself for an architecture."""
        own = own_rendering(self.sources(model, gguf).architecture, self.version)
        if own is not None:
            model.renderer, model.parser = model.renderer or own.renderer, model.parser or own.parser
            if own.stops and "stop" not in model.parameters:
                model.parameters["stop"] = list(own.stops)

    def render(self, rule: PromptRule, gguf: Path, messages: Messages, tools: Messages, think: bool | None) -> str:
        """Return the prompt of a conversation.

        Raises:
            Refused: the template does not take it.
        """
        if rule.path is PromptPath.JINJA:
            return self._render_jinja(gguf, messages, tools, think)
        if not rule.path.is_go or self._go is None:
            raise Refused(500, f"this server renders no templates of this kind ({rule.path})")
        chat = {"messages": messages, "tools": tools} | ({} if think is None else {"think": think})
        return self._go([{"Template": rule.template, "Chats": [chat]}])[0][0]

    def _render_jinja(self, gguf: Path, messages: Messages, tools: Messages, think: bool | None) -> str:
        if gguf not in self._servers:
            self._servers[gguf] = PromptServer(read_tokenizer_model(gguf))
        variables = {} if think is None else {"enable_thinking": think}
        try:
            read = [tool_as_read(tool) for tool in tools]
        except ValueError as error:
            raise Refused(400, f"json: cannot unmarshal a tool: {error}") from None
        try:
            return self._servers[gguf].render(llamacpp_messages.from_ollama(messages), read, **variables)
        except TemplateError as error:
            raise Refused(400, f'{{"error":{{"code":400,"message":"{_UNUSABLE}{error.cause}"}}}}') from None
