"""The proof that a model in Ollama gets the prompts that it was trained with: ask the server for them.

``/api/chat`` answers the rendered prompt to a request with ``_debug_render_only``, and counts the tokens of each prompt
that it reads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kolotune.chats.tokens.tokenizer import load_tokenizer
from kolotune.foundation.installation import INSTALL_LOCAL

from .client import OllamaClient, RenderedPrompt
from .prompt_path import PromptPath, PromptRule
from .prompts_to_ask import PromptToAsk, as_request
from .turn_format import common_prefix

_RENDERED_BY = {
    PromptPath.RENDERER: "Ollama's own code",
    PromptPath.HARMONY: "TEMPLATE",
    PromptPath.TEMPLATE: "TEMPLATE",
    PromptPath.KNOWN_TEMPLATE: "a template that Ollama knows",
    PromptPath.JINJA: "the GGUF's template",
    PromptPath.NONE: "no template",
}
_COUNTED = 2  # prompts whose tokens are counted: each takes one step of the model
_SHOWN = 40  # characters around a difference


class ProofKind(StrEnum):
    """What could be proven."""

    PROMPTS = "prompts"
    """Prompts were compared."""
    TOKENS_ONLY = "tokens_only"
    """The server does not show prompts; only numbers of tokens were compared."""
    NOT_INSTALLED = "not_installed"
    """Nothing was compared: rendering training's prompts takes packages that are not installed."""
    NO_PROMPTS = "no_prompts"
    """Nothing was compared: there is no prompt that the template and the server accept."""


@dataclass(frozen=True)
class PromptDifference:
    """Where a prompt of the server differs from training's.

    Attributes:
        roles: Who speaks in the chat, in order.
        position: The number of characters that are the same; of tokens, where only they were counted.
        served: What the server has there, or its refusal.
        trained: What training has there.
    """

    roles: str
    position: int
    served: str
    trained: str

    def __str__(self) -> str:
        return f"for a chat of {self.roles} Ollama has {self.served} where training has {self.trained}"


@dataclass(frozen=True)
class ServerProof:
    """What the server's prompts were compared with, and the result.

    Attributes:
        kind: What could be compared.
        prompts: The number of prompts.
        tokens: The tokens of those that were counted, all together.
        counted: The number of those.
        differences: One for each prompt that differs, in text or number of tokens.
    """

    kind: ProofKind
    prompts: int = 0
    tokens: int = 0
    counted: int = 0
    differences: tuple[PromptDifference, ...] = ()


def describe(proof: ServerProof, rule: PromptRule | None) -> str:
    """Return a line that says what was proven without a difference."""
    count = f"{proof.counted} of them read as {proof.tokens} tokens, as in training"
    if proof.kind is ProofKind.PROMPTS:
        by = f" (rendered by {_RENDERED_BY[rule.path]})" if rule else ""
        return f"{proof.prompts} of {proof.prompts} prompts as trained{by}, {count}"
    if proof.kind is ProofKind.TOKENS_ONLY:
        return f"this Ollama does not show prompts; of {proof.prompts} prompts {count}"
    if proof.kind is ProofKind.NOT_INSTALLED:
        return f"prompts were not compared with training's; to do so, {INSTALL_LOCAL}"
    return "prompts were not compared: there is none that both the template and Ollama accept"


def can_render() -> bool:
    """Whether what renders and tokenizes training's prompts is installed."""
    return all(importlib.util.find_spec(name) for name in ("jinja2", "tokenizers", "transformers"))


def prove(client: OllamaClient, name: str, prompts: Sequence[PromptToAsk], tokenizer: Path) -> ServerProof:
    """Ask a server for prompts, and compare them with training's.

    Args:
        client: The server.
        name: The model's.
        prompts: Training's.
        tokenizer: The folder of the trained tokenizer.

    Raises:
        OllamaDownError, OllamaError: There is no server, or it fails.
        ModelError: There is no tokenizer.
    """
    if not prompts:
        return ServerProof(ProofKind.NO_PROMPTS)
    differences: list[PromptDifference] = []
    kind, equal = ProofKind.PROMPTS, []
    for prompt in prompts:
        rendering = client.render(name, map(as_request, prompt.messages), prompt.tools, prompt.think)
        if rendering.text is None and not rendering.refusal:
            kind, equal = ProofKind.TOKENS_ONLY, list(prompts)
            break
        difference = _difference(prompt, rendering)
        if difference is None:
            equal.append(prompt)
        else:
            differences.append(difference)
    tokens, counted, miscounted = _count(client, name, _to_count(equal), tokenizer)
    return ServerProof(kind, len(prompts), tokens, counted, (*differences, *miscounted))


def _difference(prompt: PromptToAsk, rendering: RenderedPrompt) -> PromptDifference | None:
    served = (rendering.text or "").removeprefix(prompt.bos)
    if rendering.refusal:
        return PromptDifference(prompt.roles, 0, f"a refusal ({rendering.refusal})", repr(prompt.text[:_SHOWN]))
    if served == prompt.text:
        return None
    position = len(common_prefix(prompt.text, served))
    start = max(0, position - _SHOWN // 2)
    theirs, ours = (repr(text[start : position + _SHOWN]) for text in (served, prompt.text))
    return PromptDifference(prompt.roles, position, theirs, ours)


def _to_count(prompts: Iterable[PromptToAsk]) -> list[PromptToAsk]:
    """Choose the longest prompts: they have the most kinds of text."""
    return sorted((prompt for prompt in prompts if not prompt.tools), key=lambda prompt: -len(prompt.text))[:_COUNTED]


def _count(
    client: OllamaClient, name: str, prompts: Iterable[PromptToAsk], folder: Path
) -> tuple[int, int, list[PromptDifference]]:
    """Return the number of tokens, the number of prompts that have them, and those with another number."""
    total, counted, differences = 0, 0, []
    tokenizer = load_tokenizer(folder)
    for prompt in prompts:
        expected = len(tokenizer(prompt.bos + prompt.text, add_special_tokens=False)["input_ids"])
        served = client.count_tokens(name, map(as_request, prompt.messages), prompt.think)
        if served is None:
            continue
        total, counted = total + expected, counted + 1
        if served != expected:
            difference = PromptDifference(prompt.roles, min(served, expected), f"{served} tokens", str(expected))
            differences.append(difference)
    return total, counted, differences
