"""What Ollama takes a template to be capable of.

The rules are those of server/images.go and thinking/template.go in Ollama's source: words in the GGUF's Jinja template,
comments included, and the variables that a Go template uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .go_template_parser import TemplateNode, Word, parse_go_template

_ROLE_COMPARISONS = (
    "role'] == 'tool'", "role'] == \"tool\"", "role\"] == 'tool'", 'role"] == "tool"', "message.role == 'tool'",
    'message.role == "tool"',
)  # fmt: skip
_JINJA_RESULTS = ("tool_response", "tool_results", "ipython", *_ROLE_COMPARISONS)
_GO_RESULTS = ('eq .Role "tool"', "tool_response", "TOOL_RESULTS")


class Capability(StrEnum):
    """What a model can do, in the names of ``/api/show``."""

    COMPLETION = "completion"
    TOOLS = "tools"
    INSERT = "insert"
    THINKING = "thinking"


@dataclass(frozen=True)
class TemplateCapabilities:
    """What a template is capable of.

    Attributes:
        named: The capabilities, in Ollama's order.
        round_trip: Whether it writes tool calls and their results, too.
    """

    named: tuple[Capability, ...] = ()
    round_trip: bool = False

    def exceeds(self, other: TemplateCapabilities, *, ties: bool) -> bool:
        """Whether Ollama prefers a Jinja template of these capabilities to a Go template of the other ones.

        Args:
            other: The Go template's.
            ties: Whether Ollama compares the round trip of two templates that are both capable of tools.
        """
        if len(self.named) > len(other.named):
            return self.round_trip or not other.round_trip
        equal = set(self.named) == set(other.named) and Capability.TOOLS in self.named
        return ties and equal and self.round_trip and not other.round_trip


def jinja_capabilities(jinja: str) -> TemplateCapabilities:
    """Return what Ollama takes a GGUF's chat template to be capable of."""
    tools = "tools" in jinja or "tool_call" in jinja
    splits = "content.split('</think>')" in jinja or 'content.split("</think>")' in jinja
    thinking = ("<think>" in jinja and "</think>" in jinja) or (
        splits and "reasoning_content" not in jinja and "<SPECIAL_12>" not in jinja
    )
    calls = "tool_calls" in jinja or "assistant_tool_call" in jinja
    return TemplateCapabilities(
        _named(tools=tools, thinking=thinking), tools and calls and any(word in jinja for word in _JINJA_RESULTS)
    )


def go_capabilities(template: str) -> TemplateCapabilities:
    """Return what Ollama takes a Modelfile's TEMPLATE to be capable of.

    Raises:
        ArtifactError: It is invalid, or uses more of the language than is known.
    """
    nodes = parse_go_template(template)
    variables = {name.lower() for name in _variables(nodes)}
    tools = "tools" in variables
    opening, closing = _thinking_tags(nodes)
    named = _named(tools=tools, insert="suffix" in variables, thinking=bool(opening and closing))
    round_trip = tools and "toolcalls" in variables and any(word in template for word in _GO_RESULTS)
    return TemplateCapabilities(named, round_trip)


def _named(tools: bool = False, insert: bool = False, thinking: bool = False) -> tuple[Capability, ...]:
    flags = {Capability.TOOLS: tools, Capability.INSERT: insert, Capability.THINKING: thinking}
    return tuple(capability for capability, has in flags.items() if has)


def _variables(nodes: Sequence[TemplateNode]) -> Iterator[str]:
    """Yield the names in fields and variables: "Messages" for ``.Messages``, "$m" and "Role" for ``$m.Role``."""
    for node in nodes:
        for _, text in _counted(node.words):
            yield text.removeprefix(".")
        yield from _variables(node.body)
        yield from _variables(node.otherwise)


def _counted(words: Sequence[Word]) -> list[Word]:
    """Return the fields and variables in an action that Ollama sees: none inside of brackets that a field follows."""
    kept: list[Word] = []
    starts: list[int] = []
    for position, word in enumerate(words):
        if word == ("mark", "("):
            starts.append(len(kept))
        elif word == ("mark", ")") and starts:
            start = starts.pop()
            if position + 1 < len(words) and words[position + 1][0] == "of":
                del kept[start:]
                kept.append(("chain", ""))
        elif word[0] == "of" and kept and kept[-1][0] == "chain":
            continue
        elif word[0] in ("field", "variable", "of"):
            kept.append(word)
    return [word for word in kept if word[0] != "chain"]


def _thinking_tags(nodes: Sequence[TemplateNode]) -> tuple[str, str]:
    """Return the texts around ``.Thinking`` in a loop over ``.Messages``, by Ollama's heuristic."""
    tags = {"opening": "", "closing": ""}

    def uses(words: Sequence[Word], name: str) -> bool:
        return any(word == ("field", name) for word in _counted(words))

    def visit(siblings: Sequence[TemplateNode], in_messages: bool) -> None:
        shown = [node for node in siblings if node.kind != "text" or node.text]
        for node in shown:
            inner = in_messages
            if node.kind == "range":
                inner = uses(node.words, ".Messages")
            if inner and uses(node.words, ".Thinking"):
                if shown[0].kind == "text":
                    tags["opening"] = shown[0].text.strip()
                if shown[-1].kind == "text":
                    tags["closing"] = shown[-1].text.strip()
            visit(node.body, inner)
            visit(node.otherwise, inner)

    visit(nodes, False)
    return tags["opening"], tags["closing"]
