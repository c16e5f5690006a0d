"""Ollama's rule: what renders the prompts of a model, what ``/api/show`` then names, and what the model can do.

This is the choice made in server/images.go (GetModel, shouldPreferChatTemplate), server/routes.go
(usesOllamaRenderedChat, selectedModelTemplate) and server/create.go (renderers by architecture) of Ollama 0.33, with
what differs in older versions, and with OLLAMA_GO_TEMPLATE unset.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .template_capabilities import Capability, TemplateCapabilities, go_capabilities, jinja_capabilities

Version = tuple[int, ...]
"""The numbers of a release; empty for one that is unknown and taken to be the newest."""

READS_JINJA: Version = (0, 30, 0)
"""The first version that renders the template in the GGUF; in older ones only TEMPLATE counts."""
_COMPARES_ROUND_TRIPS: Version = (0, 30, 11)
NO_TEMPLATE = "{{ .Prompt }}"
"""What ``/api/show`` names for a model without any template."""
_HARMONY_ARCHITECTURES = ("gptoss", "gpt-oss")
_HARMONY_MARKS = ("<|start|>", "<|end|>")


class PromptPath(StrEnum):
    """What renders the prompts of a model."""

    RENDERER = "renderer"
    """Code of Ollama's own."""
    HARMONY = "harmony"
    """TEMPLATE, by Go; the answers of gpt-oss are parsed by Ollama itself."""
    TEMPLATE = "template"
    """The Modelfile's TEMPLATE, by Go."""
    KNOWN_TEMPLATE = "known_template"
    """A TEMPLATE that Ollama chose because the GGUF's template resembles it, by Go."""
    JINJA = "jinja"
    """The GGUF's own template, by llama.cpp."""
    NONE = "none"
    """The bare text."""

    @property
    def is_go(self) -> bool:
        """Whether a Go template renders the prompts."""
        return self in (PromptPath.HARMONY, PromptPath.TEMPLATE, PromptPath.KNOWN_TEMPLATE)


@dataclass(frozen=True)
class OwnRendering:
    """The code of Ollama's own for an architecture.

    Attributes:
        renderer, parser: The names for RENDERER and PARSER.
        since: The first version that sets them by itself.
        capabilities: What the parser adds.
        stops: The stop strings that Ollama sets where the Modelfile has none.
    """

    renderer: str
    parser: str
    since: Version
    capabilities: tuple[Capability, ...] = (Capability.TOOLS, Capability.THINKING)
    stops: tuple[str, ...] = ()


_NEMOTRON = OwnRendering("nemotron-3-nano", "nemotron-3-nano", (0, 22, 0))
OWN_RENDERINGS = {
    "gemma4": OwnRendering("gemma4", "gemma4", (0, 20, 0), stops=("<turn|>",)),
    "laguna": OwnRendering("laguna", "laguna", (0, 22, 0)),
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "nemotron_h_omni": _NEMOTRON,
}
"""By the GGUF's architecture: the models for which creating sets RENDERER and PARSER, whatever the Modelfile says."""


@dataclass(frozen=True)
class TemplateSources:
    """All that may decide how Ollama renders a model.

    Attributes:
        architecture: The GGUF's.
        jinja: The GGUF's chat template, or "".
        template: The Modelfile's TEMPLATE, or None.
        renderer, parser: The Modelfile's RENDERER and PARSER, or None.
        known: Without a TEMPLATE: the one that the server chose at creation, or None.
    """

    architecture: str
    jinja: str
    template: str | None = None
    renderer: str | None = None
    parser: str | None = None
    known: str | None = None


@dataclass(frozen=True)
class PromptRule:
    """How a version of Ollama renders a model.

    Attributes:
        path: What renders it.
        template: The text that ``/api/show`` names as its template.
        capabilities: What ``/api/show`` names as its capabilities, in no order.
    """

    path: PromptPath
    template: str
    capabilities: frozenset[Capability]

    @property
    def tools(self) -> bool:
        """Whether requests with tools are accepted."""
        return Capability.TOOLS in self.capabilities


def format_version(version: Version) -> str:
    """Return a version as Ollama writes it."""
    return ".".join(map(str, version))


def own_rendering(architecture: str, version: Version = ()) -> OwnRendering | None:
    """Return the code of Ollama's own that renders an architecture; None where there is none."""
    own = OWN_RENDERINGS.get(architecture)
    return own if own is not None and (not version or version >= own.since) else None


def find_rule(sources: TemplateSources, version: Version = ()) -> PromptRule:
    """Return how Ollama renders a model.

    Args:
        sources: What may decide it.
        version: The server's; empty for the newest.

    Raises:
        ArtifactError: TEMPLATE is invalid, or uses more of the language than is known.
    """
    own_template = sources.template or None  # an empty one is as none
    go = own_template or sources.known
    shown = NO_TEMPLATE if go is None else go
    of_go = TemplateCapabilities() if go is None else go_capabilities(go)
    of_jinja = jinja_capabilities(sources.jinja) if _reads(version, READS_JINJA) else TemplateCapabilities()
    has_jinja = bool(sources.jinja) and _reads(version, READS_JINJA)
    own = own_rendering(sources.architecture, version)
    is_harmony = sources.architecture in _HARMONY_ARCHITECTURES
    if sources.renderer or sources.parser or own is not None:
        path, named = PromptPath.RENDERER, (*of_go.named, *(own.capabilities if own else ()))
    elif is_harmony and all(mark in shown for mark in _HARMONY_MARKS):
        path, named = PromptPath.HARMONY, of_go.named
    elif go is None or (has_jinja and of_jinja.exceeds(of_go, ties=_reads(version, _COMPARES_ROUND_TRIPS))):
        path, named = (PromptPath.JINJA, of_jinja.named) if has_jinja else (PromptPath.NONE, ())
    else:
        path, named = PromptPath.TEMPLATE if own_template else PromptPath.KNOWN_TEMPLATE, of_go.named
    if is_harmony:
        named = (*named, Capability.THINKING)
    template = sources.jinja if path is PromptPath.JINJA else shown
    return PromptRule(path, template, frozenset((Capability.COMPLETION, *named)))


def _reads(version: Version, since: Version) -> bool:
    return not version or version >= since
