"""Comparing a server's prompts with training's; `test_install` does so with the stand-in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from kolotune.ollama.client import OllamaClient, RenderedPrompt
from kolotune.ollama.prompt_path import PromptPath, PromptRule
from kolotune.ollama.prompts_to_ask import PromptToAsk
from kolotune.ollama.server_proof import PromptDifference, ProofKind, ServerProof, describe, prove


@dataclass
class Answers:
    """What a server answers to each request."""

    rendering: RenderedPrompt
    tokens: int | None

    def render(self, name: str, messages: Iterable[Any], *_: Any) -> RenderedPrompt:
        return self.rendering

    def count_tokens(self, name: str, messages: Iterable[Any], *_: Any) -> int | None:
        return self.tokens


def prompt(text: str, bos: str = "") -> PromptToAsk:
    return PromptToAsk([{"role": "user", "content": "x"}], [], text, bos)


@pytest.fixture
def proved(tiny_base: Path) -> Any:
    def make(rendering: RenderedPrompt, tokens: int | None, *prompts: PromptToAsk) -> ServerProof:
        return prove(cast(OllamaClient, Answers(rendering, tokens)), "m", prompts, tiny_base)

    return make


def test_results(proved: Any) -> None:
    same = RenderedPrompt("<|im_start|>user\n")
    assert proved(same, 3, prompt("user\n", "<|im_start|>")) == ServerProof(ProofKind.PROMPTS, 1, 3, 1)
    assert proved(same, None, prompt("user\n", "<|im_start|>")) == ServerProof(ProofKind.PROMPTS, 1)
    assert proved(RenderedPrompt(), 3, prompt("<|im_start|>user\n")) == ServerProof(ProofKind.TOKENS_ONLY, 1, 3, 1)
    assert proved(same, 3) == ServerProof(ProofKind.NO_PROMPTS)


def test_differences(proved: Any) -> None:
    (other,) = proved(RenderedPrompt("a" * 50 + "b"), 3, prompt("a" * 50 + "c")).differences
    assert other == PromptDifference("user", 50, repr("a" * 20 + "b"), repr("a" * 20 + "c"))
    (refused,) = proved(RenderedPrompt(refusal="no"), 3, prompt("user")).differences
    assert refused == PromptDifference("user", 0, "a refusal (no)", "'user'")
    (counted,) = proved(RenderedPrompt("user"), 2, prompt("user")).differences
    assert counted == PromptDifference("user", 1, "2 tokens", "1")


def test_each_result_has_a_line() -> None:
    rule = PromptRule(PromptPath.JINJA, "", frozenset())
    assert describe(ServerProof(ProofKind.PROMPTS, 12, 317, 2), rule) == (
        "12 of 12 prompts as trained (rendered by the GGUF's template), 2 of them read as 317 tokens, as in training"
    )
    assert len({describe(ServerProof(kind, 12, 317, 2), None) for kind in ProofKind}) == len(ProofKind)
    assert all(
        "rendered by" in describe(ServerProof(ProofKind.PROMPTS), PromptRule(path, "", frozenset()))
        for path in PromptPath
    )
